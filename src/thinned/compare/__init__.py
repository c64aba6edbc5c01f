"""Holds implementations of dropout against its laws, and measures their speed, memory and training.

The files, each of which imports only those above it:

    errors, figures     an exception in a few words; numbers as a person reads them
    settings            the choices of a user
    implementation      an implementation, and what a layer's entry says of inputs, arguments and mask
    loading             names on the command line -> implementations, models
    timing, memory, training    nanoseconds an element, bytes kept for backward, a network on real digits
    laws/               one library of laws: a small function each, a file a family, for every layer
    project             the laws that a project chooses, from its pyproject.toml or from options
    layers/             an entry for each layer, a file a family as in `thinned.layers`
    explain             a law in words
    report, tables      everything that was found, and the same in words
    plots, terminal, record, page    what a person, a program and a browser read
    run                 all parts of a comparison in turn
"""
