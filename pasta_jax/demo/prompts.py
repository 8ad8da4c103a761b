"""What the demo asks; README.md shows the answers."""

from __future__ import annotations

PROMPTS = (
    "Suggest four places to visit in Japan, with a short description of each.",
    "What are four ways to reduce waste at home?",
    "Describe four famous landmarks of Paris.",
    "What are the three states of matter? Describe each of them.",
    "What is the capital of Australia?",
)
"""Their subjects are not in the data that the shipped adapters learned from. The last asks for one fact."""
