"""How implementations of dropout hold against the law of dropout, how fast they are, and how they train.

The pieces, in the order in which a comparison uses them:

    settings    what a comparison is run with
    subjects    names on the command line -> implementations
    errors      an exception in a few words
    laws/       one small function for each law, a file for each family of laws
    timing      nanoseconds an element, beside a plain multiply
    memory      bytes kept for the backward pass
    training    a network on real digits
    report      everything that was found
    tables      the report in words
    run         all parts in turn
    terminal, record, page    what a person, a program and a browser read
"""
