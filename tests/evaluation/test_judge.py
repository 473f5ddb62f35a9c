"""The judge: a client against a local server, and the benchmarks that use it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_npu.errors import UserError
from llava_npu.evaluation.judge import client as judge_client
from llava_npu.evaluation.judge.client import JudgeClient, JudgeError, JudgeSettings, judge_settings
from llava_npu.evaluation.questions import Question
from llava_npu.evaluation.reports.report import Report
from llava_npu.evaluation.run import EvaluationOptions, Progress, evaluate
from support.benchmark_samples import llavabench, mmvet, write_json
from support.evaluation_samples import FakeAnswerer, circular_rows, encoded_image, question_row, write_tsv
from support.judge_server import JudgeServer, Responder

HELLO = [{"role": "user", "content": "Hello?"}]


@pytest.fixture(autouse=True)
def no_judge_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (judge_client.URL, judge_client.MODEL, judge_client.KEY, judge_client.PRICES, "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def client(server: JudgeServer, cache: Path, **more: Any) -> JudgeClient:
    return JudgeClient(JudgeSettings(server.url, "judge-1", cache=cache, **{"retries": 3, **more}))


def failing_first(times: int, failure: Any, then: str = "fine") -> Responder:
    left = [times]

    def respond(request: dict[str, Any]) -> Any:
        left[0] -= 1
        return failure if left[0] >= 0 else then

    return respond


# --- the client -------------------------------------------------------------------------------------------------------


def test_asks_and_remembers(tmp_path: Path) -> None:
    with JudgeServer(lambda request: "fine") as server:
        judge = client(server, tmp_path, key="secret")
        first = judge.ask(HELLO, temperature=0.2, max_tokens=5)
        assert (first.text, first.prompt_tokens, first.completion_tokens, first.cached) == ("fine", 100, 10, False)
        again = client(server, tmp_path, key="other").ask(HELLO, temperature=0.2, max_tokens=5)
        assert (again.text, again.cached) == ("fine", True)
        assert not judge.ask(HELLO, temperature=0.2, max_tokens=5, attempt=1).cached
        assert not judge.ask(HELLO, temperature=0.3, max_tokens=5).cached
    assert server.paths[0] == "/v1/chat/completions"
    assert server.requests[0] == {"model": "judge-1", "messages": HELLO, "temperature": 0.2, "max_tokens": 5}
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert not any("secret" in path.read_text() for path in tmp_path.rglob("*.json"))
    assert "secret" not in repr(judge.settings)


def test_nothing_of_the_environment_goes_to_another_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "private")
    with JudgeServer(lambda request: "fine") as server:
        client(server, tmp_path).ask(HELLO, temperature=0, max_tokens=5)
    assert "private" not in str(server.headers)
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize("failure", [(500, "oops"), (429, "slow down"), b"<html>", b'{"choices": []}', ""])
def test_repeats_what_may_pass(tmp_path: Path, failure: Any) -> None:
    with JudgeServer(failing_first(2, failure)) as server:
        assert client(server, tmp_path).ask(HELLO, temperature=0, max_tokens=5).text == "fine"
    assert len(server.requests) == 3


def test_gives_up_after_all_retries(tmp_path: Path) -> None:
    with JudgeServer(lambda request: (503, "overloaded")) as server:
        with pytest.raises(JudgeError, match=r"status 503: overloaded \(asked 4 times\)"):
            client(server, tmp_path).ask(HELLO, temperature=0, max_tokens=5)
        assert len(server.requests) == 4
    assert list(tmp_path.rglob("*.json")) == []


@pytest.mark.parametrize(("status", "message"), [(401, "bad key"), (404, "no such model"), (307, "moved")])
def test_a_refusal_is_the_users_to_fix(tmp_path: Path, status: int, message: str) -> None:
    with (
        JudgeServer(lambda request: (status, message)) as server,
        pytest.raises(UserError, match=f"judge judge-1 at {server.url} refuses: status {status}: {message}"),
    ):
        client(server, tmp_path).ask(HELLO, temperature=0, max_tokens=5)
    assert len(server.requests) == 1  # a redirection is not followed: the key stays here


def test_nobody_there(tmp_path: Path) -> None:
    with JudgeServer(lambda request: "fine") as server:
        pass
    with pytest.raises(JudgeError, match="no connection to http://127"):
        client(server, tmp_path, retries=1).ask(HELLO, temperature=0, max_tokens=5)


def test_a_damaged_cache_entry_is_asked_again(tmp_path: Path) -> None:
    with JudgeServer(lambda request: "fine") as server:
        judge = client(server, tmp_path)
        judge.ask(HELLO, temperature=0, max_tokens=5)
        (entry,) = tmp_path.rglob("*.json")
        entry.write_text("{torn")
        assert not judge.ask(HELLO, temperature=0, max_tokens=5).cached
        assert judge.ask(HELLO, temperature=0, max_tokens=5).cached


def test_settings_come_from_arguments_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge_settings() is None
    monkeypatch.setenv(judge_client.URL, "http://somewhere/v1")
    monkeypatch.setenv(judge_client.MODEL, "m")
    monkeypatch.setenv(judge_client.KEY, "k")
    monkeypatch.setenv(judge_client.PRICES, "2.5,10")
    found = judge_settings(model="other")
    assert found is not None
    assert (found.url, found.model, found.key, found.prices) == ("http://somewhere/v1", "other", "k", (2.5, 10.0))
    named = judge_settings("https://user:password@host:81/v1?x=y")
    assert named is not None
    assert named.address == "https://host:81/v1"


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("https://api.openai.com/v1", "open"),
        ("http://api.openai.com/v1", ""),
        ("https://openai.com.evil.example/v1", ""),
        ("https://notopenai.com/v1", ""),
        ("http://localhost:8000/v1", ""),
    ],
)
def test_openais_key_goes_to_openai_alone(monkeypatch: pytest.MonkeyPatch, url: str, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "open")
    found = judge_settings(url, "m")
    assert found is not None
    assert found.key == key


def test_models_that_take_other_parameters(tmp_path: Path) -> None:
    def refuse(request: dict[str, Any]) -> Any:  # as OpenAI's newer models do
        if "max_tokens" in request:
            return 400, "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
        if "temperature" in request:
            return 400, "Unsupported value: 'temperature' does not support 0 with this model."
        return "1.0"

    with JudgeServer(refuse) as server:
        judge = client(server, tmp_path / "cache", parallel=1)
        report = run("mmvet", mmvet(tmp_path), tmp_path, lambda question: "six", judge)
        assert len(server.requests) == 2 + 3
        assert server.requests[-1]["max_completion_tokens"] >= 1024
    assert values(report)["score", "overall"] == 1
    assert "The judge does not take a temperature" in " ".join(report.notes)


def test_a_judge_that_refuses_every_answer_is_the_users_to_fix(tmp_path: Path) -> None:
    with JudgeServer(lambda request: (400, "no such template")) as server:
        judge = client(server, tmp_path / "cache")
        with pytest.raises(UserError, match=r"refuses every answer, the first so: .* 400: no such template"):
            run("mmvet", mmvet(tmp_path), tmp_path, lambda question: "six", judge)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("http://x/v1", None), "its model: give --judge-model or set LLAVA_NPU_JUDGE_MODEL"),
        ((None, "m"), r"a judge model \(m\) is named, but not its endpoint"),
        (("file:///etc/passwd", "m"), "judge URL 'file:///etc/passwd': expected"),
        (("localhost:8000", "m"), "expected something like http"),
        (("http://x:port/", "m"), "expected something like http"),
        (("http://x/v1", "m", "cheap"), "judge prices 'cheap': two numbers"),
    ],
)
def test_settings_mistakes(arguments: tuple[str | None, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        judge_settings(*arguments)


# --- benchmarks -------------------------------------------------------------------------------------------------------


def run(
    name: str, data: Path, tmp_path: Path, respond: Callable[[Question], str], judge: JudgeClient | None = None
) -> Report:
    return evaluate(name, data, FakeAnswerer(respond), tmp_path / "out", EvaluationOptions(judge=judge))


def values(report: Report) -> dict[tuple[str, str], float]:
    return {(score.metric, score.name): score.value for score in report.scores}


def test_mmvet_without_a_judge_predicts(tmp_path: Path) -> None:
    report = run("mmvet", mmvet(tmp_path), tmp_path, lambda question: f"It is {question.id}")
    assert report.scores == ()
    assert "No judge was given (--judge-url, --judge-model): predictions only, no score." in report.notes
    written = json.loads((tmp_path / "out" / "submission" / "mm-vet.json").read_text())
    assert written == {f"v1_{n}": f"It is v1_{n}" for n in range(3)}


def test_mmvet_with_a_judge(tmp_path: Path) -> None:
    grades = {"v1_0": "0.5", "v1_1": "Score: 1.0"}

    def grade(request: dict[str, Any]) -> str:
        text = request["messages"][-1]["content"]
        return next(reply for name, reply in grades.items() if f"It is {name}" in text)

    def answer(question: Question) -> str:
        return f"It is {question.id}" if question.id != "v1_2" else " "

    data = mmvet(tmp_path)
    run("mmvet", data, tmp_path, answer)  # the predictions are there already when a judge comes
    with JudgeServer(grade) as server:
        report = run("mmvet", data, tmp_path, answer, client(server, tmp_path / "cache", prices=(1.0, 10.0)))
        assert len(server.requests) == 2  # nothing is to be judged of an empty answer
        again = run("mmvet", data, tmp_path, answer, client(server, tmp_path / "cache"))
        assert len(server.requests) == 2
    found = values(report)
    assert found["score", "overall"] == 0.5
    assert found["score", "ocr"] == 0.25  # 0.5 and 0
    assert found["score", "ocr,math"] == found["score", "math"] == 0.5
    assert values(again) == found
    notes = " ".join(report.notes)
    assert (
        f"Judge judge-1 at {server.url} (rule judge): 2 answers, 0 from the cache; now 200 tokens read and 20 " in notes
    )
    assert "cost 0.0004" in notes
    assert "not comparable with published ones" in notes
    assert "2 from the cache; now 0 tokens read and 0 written, price unknown; with the cache 200 tokens" in " ".join(
        again.notes
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "judgements.jsonl").read_text().splitlines()]
    assert {line["id"]: line["reading"] for line in lines} == {"v1_0": "0.5", "v1_1": "1.0"}


def test_mmvet_instruction_from_a_file(tmp_path: Path) -> None:
    data = mmvet(tmp_path)
    (data.parent / "judge_prompt.txt").write_text("Question | Truth | Prediction | Correctness\n", encoding="utf-8")
    with JudgeServer(lambda request: "1.0") as server:
        report = run("mmvet", data, tmp_path, lambda question: "six", client(server, tmp_path / "cache"))
    asked = sorted(request["messages"][0]["content"] for request in server.requests)
    assert asked[0] == "Question | Truth | Prediction | Correctness\n\nWhat is x in 0? | -0 <AND> 5 | six | "
    assert "not comparable" not in " ".join(report.notes)


def test_unreadable_replies_count_as_wrong_and_are_reported(tmp_path: Path) -> None:
    replies = iter(["good", "2.0", "very good"] + ["1.0"] * 2)
    with JudgeServer(lambda request: next(replies)) as server:
        judge = client(server, tmp_path / "cache", parallel=1)
        report = run("mmvet", mmvet(tmp_path), tmp_path, lambda question: "six", judge)
        assert len(server.requests) == 5  # three attempts at the first
    assert values(report)["score", "overall"] == pytest.approx(2 / 3)
    notes = " ".join(report.notes)
    assert "The judge failed for 1 of 3 answers" in notes
    assert "unreadable reply 'very good' (3 attempts)" in notes


def test_a_judge_that_goes_down_gives_no_score_and_is_asked_for_the_rest_later(tmp_path: Path) -> None:
    data = mmvet(tmp_path, questions=9)
    up = [2]

    def grade(request: dict[str, Any]) -> Any:
        up[0] -= 1
        return "0.5" if up[0] >= 0 else (503, "restarting")

    with JudgeServer(grade) as server:
        judge = client(server, tmp_path / "cache", retries=1, parallel=1, prices=(1.0, 10.0))
        report = run("mmvet", data, tmp_path, lambda question: "six", judge)
        assert report.scores == ()
        assert len(server.requests) == 2 + 3 * 2  # three questions, each asked twice; the last four not at all
        notes = " ".join(report.notes)
        assert (
            "The judge gave no reply for 7 of 9 answers (first: v1_2: status 503: restarting (asked 2 times))" in notes
        )
        assert "the rule judge gives no score" in notes
        lines = [json.loads(line) for line in (tmp_path / "out" / "judgements.jsonl").read_text().splitlines()]
        assert [line["pending"] for line in lines] == [False] * 2 + [True] * 7
        assert "not asked any more" in lines[-1]["error"]

        up[0] = 99
        judge = client(server, tmp_path / "cache", parallel=1, prices=(1.0, 10.0))
        report = run("mmvet", data, tmp_path, lambda question: "six", judge)
    assert values(report)["score", "overall"] == 0.5
    notes = " ".join(report.notes)
    assert "9 answers, 2 from the cache; now 700 tokens read and 70 written, cost 0.0014" in notes
    assert "with the cache 900 tokens read and 90 written, cost 0.0018" in notes


def test_a_judge_that_is_down_takes_no_other_rules_scores(tmp_path: Path) -> None:
    data = write_tsv(tmp_path / "own.tsv", [question_row(group, ["red", "blue"], 0) for group in (1, 2)])
    with JudgeServer(lambda request: (500, "down")) as server:
        judge = client(server, tmp_path / "cache", retries=0)
        said = {"1": "A", "2": "who knows"}
        report = run("multiple_choice", data, tmp_path, lambda question: said[question.id], judge)
    assert {score.extraction for score in report.scores} == {"strict", "vlmevalkit"}
    assert report.overall("vanilla").value == 0.5


def test_one_refused_request_is_a_failure_of_that_answer(tmp_path: Path) -> None:
    def grade(request: dict[str, Any]) -> Any:
        return (400, "content filter") if "What is x in 1" in request["messages"][-1]["content"] else "1.0"

    with JudgeServer(grade) as server:
        report = run("mmvet", mmvet(tmp_path), tmp_path, lambda question: "six", client(server, tmp_path / "cache"))
        assert len(server.requests) == 3
    assert values(report)["score", "overall"] == pytest.approx(2 / 3)
    assert "failed for 1 of 3 answers (first: v1_1: refused with status 400: content filter)" in " ".join(report.notes)


def test_judging_tells_how_far_it_is(tmp_path: Path) -> None:
    seen: list[Progress] = []
    with JudgeServer(lambda request: "1.0") as server:
        judge = client(server, tmp_path / "cache")
        answerer = FakeAnswerer(lambda question: "six")
        evaluate(
            "mmvet",
            mmvet(tmp_path),
            answerer,
            tmp_path / "out",
            EvaluationOptions(judge=judge, on_progress=seen.append),
        )
    assert [(each.done, each.total) for each in seen if each.judging] == [(1, 3), (2, 3), (3, 3)]


def test_a_refusing_judge_stops_at_once(tmp_path: Path) -> None:
    with JudgeServer(lambda request: (401, "bad key")) as server:
        judge = client(server, tmp_path / "cache", parallel=1)
        with pytest.raises(UserError, match="status 401: bad key"):
            run("mmvet", mmvet(tmp_path), tmp_path, lambda question: "six", judge)
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 3


def test_mmvet_damaged(tmp_path: Path) -> None:
    data = mmvet(tmp_path)
    write_json(data.parent / "mm-vet.json", {"v1_0": {"answer": "x", "capability": []}})
    with pytest.raises(UserError, match="record 'v1_0', field 'capability': empty"):
        run("mmvet", data, tmp_path, lambda question: "")


def test_llavabench_relative_score(tmp_path: Path) -> None:
    def grade(request: dict[str, Any]) -> str:
        text = request["messages"][-1]["content"]
        assert request["messages"][0]["role"] == "system"
        assert "[Context]\nA red square.\n\n[Question]\nDescribe " in text
        assert "[Assistant 2]\nIt is red.\n\n[End of Assistant 2]\n\n[System]\n" in text
        return {"0": "8 4\nbecause", "1": "10, 9.5", "2": "Both are good."}[text.split("Describe ")[1][0]]

    with JudgeServer(grade) as server:
        judge = client(server, tmp_path / "cache")
        report = run("llavabench", llavabench(tmp_path), tmp_path, lambda question: "It is red.", judge)
    found = values(report)
    assert found["relative score", "overall"] == pytest.approx(13.5 / 18)
    assert found["relative score", "conv"] == 0.5
    assert found["own score", "overall"] == pytest.approx(13.5 / 20)
    assert found["reference score", "detail"] == 1
    assert ("relative score", "complex") not in found
    assert "1 of 3 questions have no grades and are left out of both means." in report.notes


def test_llavabench_uses_the_original_rules_if_they_are_there(tmp_path: Path) -> None:
    data = llavabench(tmp_path)
    rules = {
        f"llava_bench_{name}": {"role": "Bot", "prompt": f"Rule of {name}."} for name in ("conv", "detail", "complex")
    }
    write_json(data.parent / "rule.json", rules)
    with JudgeServer(lambda request: "5 5") as server:
        run("llavabench", data, tmp_path, lambda question: "Red.", client(server, tmp_path / "cache"))
    asked = sorted(request["messages"][-1]["content"] for request in server.requests)
    assert asked[0].endswith("[Bot 2]\nRed.\n\n[End of Bot 2]\n\n[System]\nRule of conv.\n\n")
    del rules["llava_bench_conv"]
    write_json(data.parent / "rule.json", rules)
    with pytest.raises(UserError, match="has no rule 'llava_bench_conv'"):
        run("llavabench", data, tmp_path, lambda question: "Red.")


def test_llavabench_table(tmp_path: Path) -> None:
    row = {"index": 0, "question": "What?", "category": "conv", "caption": "A cat.", "gpt4_ans": "A cat sits."}
    columns = (*row, "image")
    data = write_tsv(tmp_path / "LLaVABench.tsv", [{**row, "image": encoded_image((1, 1, 1))}], columns)
    with JudgeServer(lambda request: "9 6") as server:
        report = run("llavabench", data, tmp_path, lambda question: "Cat.", client(server, tmp_path / "cache"))
    assert values(report)["relative score", "overall"] == pytest.approx(2 / 3)


def test_choice_fallback_asks_only_what_no_rule_reads(tmp_path: Path) -> None:
    rows = [question_row(group, ["a red thing", "a blue thing"], 0) for group in (1, 2, 3)]
    data = write_tsv(tmp_path / "own.tsv", rows)
    said = {"1": "A", "2": "the scarlet one", "3": "either of them, who knows"}
    with JudgeServer(lambda request: "A" if "scarlet" in request["messages"][0]["content"] else "Z") as server:
        judge = client(server, tmp_path / "cache")
        report = run("multiple_choice", data, tmp_path, lambda question: said[question.id], judge)
    assert len(server.requests) == 2
    assert report.overall("vanilla", "vlmevalkit").value == pytest.approx(1 / 3)
    assert report.overall("vanilla", "vlmevalkit+judge").value == pytest.approx(2 / 3)
    assert report.overall("vanilla", "strict").value == pytest.approx(1 / 3)


def test_mmbench_needs_no_judge(tmp_path: Path) -> None:
    data = write_tsv(tmp_path / "b.tsv", circular_rows(groups=2))
    report = run("mmbench", data, tmp_path, lambda question: "A")
    assert {score.extraction for score in report.scores} == {"strict", "vlmevalkit"}
    assert not any("judge" in note.lower() for note in report.notes)
