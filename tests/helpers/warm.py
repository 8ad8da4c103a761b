"""What the process that commands are forked from has done before it: it imports this module (`commands.py`)."""

from pasta_jax.data import almanac

almanac.load_tokenizer()  # trains it, for longer than most commands take
