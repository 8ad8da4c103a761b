"""Almanac, the embedded benchmark: facts as instructions, answers that a program can check (docs/design.md 11).

In order of data flow:
  facts      the knowledge: KINDS, FACTS, value, say, successor
  split      the combinations held out for evaluation: held_out
  families   tasks and the structure of their answers: Task, plain, list_task, ...
  draw       random tasks: training_task, evaluation_tasks
  text       for the base model: base_documents, tokenizer_corpus, train_tokenizer
  annotator  tasks -> annotated answers, imperfect on purpose: annotate, annotate_exactly, Rates
  sources    documents for training, by index: SOURCES, source, load_tokenizer
  prompts    prompt -> task: task_of
  judge      answers -> truth: truth, compare

Nothing here imports jax. All randomness comes from a generator or seed in the arguments.

Examples:
  >>> import numpy as np
  >>> task = training_task(np.random.default_rng(0), "compare")
  >>> truth(task, plain(task)).score
  1.0
"""

from pasta_jax.data.almanac.annotator import PERFECT, Rates, annotate, annotate_exactly
from pasta_jax.data.almanac.draw import evaluation_tasks, training_task
from pasta_jax.data.almanac.facts import FACTS, KIND_OF, KINDS, Fact, say, successor, value
from pasta_jax.data.almanac.families import (
    FAMILIES,
    PARALLEL_FAMILIES,
    Section,
    Step,
    Task,
    chain_task,
    compare_task,
    list_task,
    mixed_task,
    plain,
    prose_task,
    report_task,
    single_task,
)
from pasta_jax.data.almanac.judge import CONCLUSION_WEIGHT, Verdict, compare, truth
from pasta_jax.data.almanac.prompts import task_of
from pasta_jax.data.almanac.sources import SOURCES, AlmanacSource, load_tokenizer, source
from pasta_jax.data.almanac.split import held_out
from pasta_jax.data.almanac.text import base_document, base_documents, tokenizer_corpus, train_tokenizer
