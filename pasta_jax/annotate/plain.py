"""`--plain`: annotated answers without their tags, for a sequential baseline that learns the same answers."""

from __future__ import annotations

import json

from pasta_jax.annotate.run import as_json, check_output
from pasta_jax.data.layouts import Fault, replaced
from pasta_jax.data.reading import RecordError, entries
from pasta_jax.data.records import Reader, raw_text
from pasta_jax.files import replacing
from pasta_jax.lang.assemble import assemble
from pasta_jax.lang.render import escape


def write_plain(path: str, output: str, reader: Reader) -> str:
    """Writes the records of a file without the tags in their answers, and says how many there are.

    Nothing else of a record is altered. Those that cannot be read are left out, and counted.

    Raises:
      RunError: `output` is the file itself.
      RecordError: the file cannot be read, or none of its records.
    """
    check_output(path, output)
    written, unusable = 0, 0
    with replacing(output) as file:
        for entry in entries(path):
            try:
                examples = reader.examples(entry)
            except Fault:
                unusable += 1
                continue
            record = json.loads(raw_text(entry))
            for example in examples:
                record = replaced(record, example.turn, escape(assemble(example.program)), reader.columns)
            file.write(as_json(record) + "\n")
            written += 1
        if not written:
            raise RecordError(f"{path}: none of {unusable:,} records can be read.")
    left_out = f"; {unusable:,} cannot be read" * (unusable > 0)
    return f"{output} has {written:,} records without tags{left_out}."
