"""The annotate command with an endpoint, killed and resumed: nothing is lost, and nothing paid for twice."""

import collections
import json
import os
import pathlib
import re
import signal
import time

import pytest

from pasta_jax.data.records import read_records
from pasta_jax.endpoint.cache import key_of
from pasta_jax.endpoint.client import TEST
from pasta_jax.files import read_jsonl, write_jsonl
from pasta_jax.lang.assemble import assemble
from tests.helpers import chat_models, full, started
from tests.helpers.chat_server import KEY, Body, ChatServer, Rates, Status, chat_server

CONCURRENCY = 64

COMMAND = """if True:
    import runpy
    from pasta_jax.endpoint.client import Endpoint
    Endpoint.__init__.__kwdefaults__["backoff"] = 0.05  # else it waits for most of the time
    runpy.run_module("pasta_jax.annotate", run_name="__main__", alter_sys=True)
"""


def answered(server: ChatServer) -> int:
    return sum(each in ("altered", "answered") for each in server.counts().elements())


def kept(replies: pathlib.Path) -> set[str]:
    """The requests whose replies the cache has."""
    return {line["request"] for line in read_jsonl(replies / "replies.jsonl", dict)}


@pytest.mark.slow
@pytest.mark.parametrize(("count", "kills"), [full(5000, 3)])
def test_a_run_that_is_killed_goes_on(count: int, kills: int, tmp_path: pathlib.Path) -> None:
    data, output = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    replies = tmp_path / "out.jsonl.run" / "replies"
    records = [chat_models.rivers(i) for i in range(count)]
    write_jsonl(data, ({"prompt": prompt, "response": answer} for prompt, answer in records))
    before: list[tuple[set[str], collections.Counter[str]]] = []

    def model(body: Body) -> str:
        if re.search(r"country \d*[05]0\.", body["messages"][-1]["content"]):
            raise Status(400, "content filter")
        return chat_models.annotator(body)

    with chat_server(model, Rates()) as server:
        command = ["-c", COMMAND, f"--input={data}", f"--output={output}", "--annotator=llm"]
        command += ["--tokenizer=almanac", f"--base_url={server.url}", "--model=tiny", "--timeout=3"]
        command += [f"--concurrency={CONCURRENCY}", "--price_in=1", "--price_out=4"]
        for run in range(kills + 1):
            process = started.fork(command, tmp_path / f"log{run}", OPENAI_API_KEY=KEY)
            while process.poll() is None and (run == kills or answered(server) < (run + 1) * count // 2):
                time.sleep(0.05)
            if run < kills:
                process.kill()
                assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
                time.sleep(0.5)  # the server notices
                sent = collections.Counter({name: len(each) for name, each in server.outcomes.items()})
                before.append((kept(replies), sent))
        assert process.wait() == 0, (tmp_path / f"log{kills}").read_text()

        for names, sent in before:
            again = [name for name in names if len(server.outcomes[name]) > sent[name]]
            assert names and not again, "a reply that was kept is never asked for again"
        repeated = server.repeated()
        test = {"model": "tiny", "messages": [*TEST], "temperature": 0.0}  # after each refusal
        del repeated[key_of([f"{server.url}/chat/completions", test])]
        assert len(repeated) <= kills * CONCURRENCY, "but for those that were under way at a kill"
        good = [sum(each in ("altered", "answered") for each in outcomes) for outcomes in repeated.values()]
        assert all(count <= kills + 1 for count in good)
        counts = server.counts()
        assert all(
            counts[kind] > 0.02 * server.total for kind in ("busy", "error", "hang", "broken", "altered")
        )

    journal = read_jsonl(tmp_path / "out.jsonl.run" / "journal.jsonl", dict)
    assert sorted(line["number"] for line in journal) == [*range(1, count + 1)], "each record exactly once"
    reasons = {line["number"]: line["outcomes"][0]["reason"] for line in journal}
    examples, problems = read_records(output)
    assert not problems and [(each.prompt, assemble(each.program)) for each in examples] == records
    for number, example in enumerate(examples, start=1):
        assert any(True for _ in example.program.promises()) == (not reasons[number])
    assert sum(not reason for reason in reasons.values()) > 0.95 * count

    assert sum(1 for each in examples for _ in each.program.promises()) > 2.8 * count

    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert report["answers"] == count and sum(report["reasons"].values()) == sum(map(bool, reasons.values()))
    for folder, _, files in os.walk(tmp_path):
        for name in files:
            assert KEY.encode() not in (pathlib.Path(folder) / name).read_bytes(), f"the key is in {name}"
    print(f"{server.total:,} requests, {dict(counts)}, {len(repeated)} were under way at a kill")
