"""The demo: a published model, taught to answer in parallel, answers real prompts beside itself as it was."""
