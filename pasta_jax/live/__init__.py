"""Answers on a terminal while they are decoded: one, or those of a conversation."""
