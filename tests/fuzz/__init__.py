"""Random and hostile inputs for whatever takes input from outside: `python -m tests.fuzz`, or `make fuzz`.

A target (`runner.Target`) draws inputs and checks them. A module of this package holds one target each; the corpus
has the inputs that once were findings, and some that never were. An input is plain data that JSON can hold, so that
it can be kept, shown and made smaller; `hostile.expand` makes large and odd values of small ones.
"""
