"""Events, of which the entropy coder (`rans.py`) makes words: their fields, and what their frequencies sum to.

An event is a symbol under a context with some plain bits behind it, or an id.
"""

STATES = 8
FIRST = 1 << 31
"""Each state where the encoder starts, so where the decoder must end."""
SLOT_BITS, ID_SLOT_BITS = 10, 13
"""Log2 of what the frequencies of one context, and those of the buckets of ids, sum to."""
SYMBOLS = 64
"""Symbols of each context."""
CONTEXT, BITS, VALUE, ID = 8, 16, 24, 1 << 48
"""Shifts in an event: symbol, context, number of plain bits, their value or the id (24 bits); mark of an id."""
