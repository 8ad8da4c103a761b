"""What the demo asks; README.md shows the answers."""

from __future__ import annotations

PROMPTS = (
    "What are five easy ways to save water at home?",
    "Compare living in a big city with living in the countryside.",
    "How do I prepare for moving to a new apartment?",
    "Explain three causes of stress and what helps against each.",
    "What is the capital of Australia?",
)
"""Their subjects are not in the data that the shipped adapters learned from. The last asks for one fact."""
