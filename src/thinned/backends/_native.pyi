from collections.abc import Sequence

compiler: str
dtypes: tuple[str, ...]
flags: str
functions: tuple[str, ...]

def choose(
    x: int,
    y: int,
    dtype: int,
    n: int,
    numbers: int,
    T: int,
    scale: float,
    shift: float,
    fill: float,
    /,
) -> None: ...
def compiled_isas() -> list[str]: ...
def flat(
    x: int,
    y: int,
    dtype: int,
    n: int,
    T: int,
    scale: float,
    shift: float,
    fill: float,
    key: int,
    /,
) -> None: ...
def fold(y: int, key: int, data: int, /) -> None: ...
def fold_many(y: int, keys: int, key_step: int, data: int, data_step: int, n: int, /) -> None: ...
def fused(
    function: int,
    x: int,
    other: int,
    bias: int,
    y: int,
    dtype: int,
    rows: int,
    n: int,
    columns: int,
    T: int,
    scale: float,
    key: int,
    keys: int,
    /,
) -> None: ...
def isa() -> str: ...
def numbers(y: int, keys: int, starts: int, rows: int, count: int, /) -> None: ...
def philox(key: int, counter: int, /) -> int: ...
def set_isa(name: str, /) -> None: ...
def strata(
    y: int,
    u: int,
    v: int,
    draws: int,
    sources: int,
    rows: int,
    count: int,
    source_rows: int,
    strata: int,
    /,
) -> None: ...
def strided(
    x: int,
    y: int,
    dtype: int,
    shape: Sequence[int],
    x_strides: Sequence[int],
    y_strides: Sequence[int],
    mask_strides: Sequence[int],
    base: int,
    T: int,
    scale: float,
    shift: float,
    fill: float,
    key: int,
    keys: int,
    key_shape: Sequence[int],
    key_strides: Sequence[int],
    /,
) -> None: ...
def supported_isas() -> list[str]: ...
def threads() -> int: ...
