"""What the demo asks; README.md shows the answers."""

from __future__ import annotations

PROMPTS = (
    "Name four instruments of an orchestra and describe each.",
    "Give me four tips for public speaking.",
    "Describe four gods of ancient Greece.",
    "What are four ways to reduce waste at home?",
    "What is the capital of Australia?",
)
"""None is among the prompts that the shipped adapters learned from. The last asks for one fact."""
