"""`paramserver bench`: what it counts is what was exchanged, its processes end with it, and its errors are clear."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from paramserver.cli.__main__ import main
from paramserver.cli.bench import choices, codec, exchange, report, wire
from paramserver.cli.bench.crew import Crew, Line, MeasurementError, cpu_seconds
from paramserver.cli.errors import InputError
from paramserver.encoding import EncodingOptions, encoding_names, make_encoding
from paramserver.protocol.layout import BLOCK_ELEMENTS

Capture = pytest.CaptureFixture[str]
Processes = Callable[[], list[psutil.Process]]

INT8_BF16 = choices.parse_ways("int8", "bf16")


# ------------------------------------------------------------------------------ choices


@pytest.mark.parametrize(
    ("text", "sizes"), [("7", [7]), ("100k,1M", [100_000, 1_000_000]), (" 2.5M , 0.5k", [2_500_000, 500])]
)
def test_sizes_are_read_with_their_units(text: str, sizes: list[int]) -> None:
    assert choices.parse_sizes(text, "--sizes") == sizes


@pytest.mark.parametrize("text", ["", "1,", "0", "-1", "1G", "1.5", "1e3", "0.0001k", "9999M", "ten", "1_000", "nan"])
def test_a_size_that_is_none_is_refused_by_the_option_and_what_was_found(text: str) -> None:
    with pytest.raises(InputError, match=r"--sizes: found '.*'; sizes are whole numbers from 1 to 1000000000"):
        choices.parse_sizes(text, "--sizes")


@pytest.mark.parametrize("elements", [1, 999, 1000, 1234, 100_000, 1_000_000, 2_500_000, 50_000_000])
def test_a_short_size_reads_back_as_the_same_number(elements: int) -> None:
    assert choices.parse_sizes(choices.short_size(elements), "--sizes") == [elements]


def test_a_way_is_a_name_or_a_section_of_a_job() -> None:
    ways = choices.parse_pair("{encoding: int8, tile: 2048}/bf16", "--pairs")
    assert ways == choices.Ways({"encoding": "int8", "tile": 2048}, {"encoding": "bf16"})
    assert ways.label == "int8 (tile 2048) / bf16"
    assert choices.synthetic_job(ways, exchange.MOMENTUM).push.tile == 2048


@pytest.mark.parametrize(
    ("push", "part"),
    [
        ("int9", "did you mean 'int8'"),
        ("{tile: 64}", "give an encoding's name"),
        ("[int8]", "give an encoding's name"),
        ("{encoding: int8, tile: 7}", "power of two"),
        ("{encoding: int8, tiles: 64}", "did you mean 'tile'"),
        ("{", "not readable as YAML"),
        ("8", "give an encoding's name"),
    ],
)
def test_a_way_that_no_job_may_have_is_refused(push: str, part: str) -> None:
    with pytest.raises(InputError, match=part):
        choices.synthetic_job(choices.parse_ways(push, "fp32"), exchange.MOMENTUM)


def test_a_pair_needs_both_ways() -> None:
    with pytest.raises(InputError, match="a pair is PUSH/PULL"):
        choices.parse_pair("int8", "--pairs")


def test_figures_have_no_exponent_and_keep_three_digits() -> None:
    assert [report.figure(value) for value in (0.01234, 1.234, 123.4, 12345.6)] == ["0.0123", "1.23", "123", "12,346"]
    assert report.spread([3.0, 1.0, 2.0]) == "2 (1-3)"
    assert report.spread([5.0]) == "5"


# --------------------------------------------------------------------------------- crew


def say_twice_of(line: Line) -> None:
    line.say(2 * line.hear())


def fail(line: Line) -> None:
    raise SystemExit(7)


def cannot_go_on(line: Line) -> None:
    raise MeasurementError("the memory is full")


def break_down(line: Line) -> None:
    raise KeyError("a part")


def wait_for_word(line: Line) -> None:
    line.say(os.getpid())
    line.hear()


def hear_nothing(line: Line) -> None:
    line.say(os.getpid())
    threading.Event().wait(100)


def ignore_its_end(line: Line) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wait_for_word(line)


def tell_variable(line: Line, name: str) -> None:
    line.say(os.environ.get(name))


def burn(line: Line, seconds: float) -> None:
    line.hear()
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
    line.say(None)
    line.hear()


def test_children_answer_in_the_order_asked_for() -> None:
    with Crew() as crew:
        children = [crew.start(f"child-{number}", say_twice_of) for number in range(2)]
        for child, word in zip(children, (10, 20), strict=True):
            child.say(word)
        assert crew.hear(reversed(children), "its word") == [40, 20]
        crew.join(children)


def test_a_child_that_dies_is_named_at_once_even_when_another_is_awaited() -> None:
    started = time.monotonic()
    with Crew() as crew:
        waiting = crew.start("waiting", say_twice_of)
        crew.start("dying", fail)
        with pytest.raises(MeasurementError, match="dying ended with exit code 7 when its word was awaited"):
            crew.hear([waiting], "its word", seconds=100)
    assert time.monotonic() - started < 50


@pytest.mark.parametrize(
    ("target", "text"),
    [("cannot_go_on", "child cannot go on: the memory is full"), ("break_down", "cannot go on: KeyError: 'a part'")],
)
def test_the_last_words_of_a_child_reach_whoever_waits(target: str, text: str, capfd: Capture) -> None:
    with Crew() as crew:
        child = crew.start("child", globals()[target])
        with pytest.raises(MeasurementError, match=text):
            crew.hear([child], "its word")
    # A traceback is for faults of the program.
    assert ("Traceback" in capfd.readouterr().err) == (target == "break_down")


def test_a_child_that_stays_silent_is_told_when_the_time_is_over() -> None:
    with Crew() as crew, pytest.raises(MeasurementError, match="waited 0 s in vain for silent: its word"):
        crew.hear([crew.start("silent", say_twice_of)], "its word", seconds=0.2)


def test_leaving_a_crew_early_ends_every_child_even_one_that_ignores_sigterm(processes: Processes) -> None:
    pids: list[int] = []

    def interrupted() -> None:
        with Crew() as crew:
            children = [crew.start("patient", wait_for_word), crew.start("stubborn", ignore_its_end)]
            pids.extend(crew.hear(children, "its pid"))
            assert all(psutil.pid_exists(pid) for pid in pids)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(pids) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_children_end_when_their_parent_is_killed(processes: Processes, poll: Callable[..., Any]) -> None:
    code = (
        "import test_cli_bench as here; from paramserver.cli.bench.crew import Crew\n"
        "if __name__ == '__main__':\n"
        "    with Crew() as crew:\n"
        "        print(*crew.hear([crew.start('a', here.hear_nothing)], 'pid'), flush=True)\n"
        "        input()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.kill()
    poll("the child to end", lambda: not psutil.pid_exists(pid), seconds=20)


def test_the_environment_is_the_children_s_alone() -> None:
    with Crew({"PARAMSERVER_BENCH_TEST": "on"}) as crew:
        assert crew.hear([crew.start("child", tell_variable, "PARAMSERVER_BENCH_TEST")], "its variable") == ["on"]
    assert "PARAMSERVER_BENCH_TEST" not in os.environ


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not tell")
def test_cpu_seconds_are_those_of_all_children() -> None:
    with Crew() as crew:
        children = [crew.start(f"child-{number}", burn, 0.3) for number in range(2)]
        before = cpu_seconds(children)
        for child in children:
            child.say()
        crew.hear(children, "its work")
        after = cpu_seconds(children)
        crew.end(children)
    assert before is not None
    assert after is not None
    # The start of the interpreters may be counted as well, where it was not over.
    assert 0.55 < after - before < 30


# ------------------------------------------------------------------------- measurements


def test_a_rate_counts_what_the_shards_have_taken_and_given(processes: Processes) -> None:
    elements, shards, workers = 10_000, 2, 2
    rate = exchange.measure(exchange.Setting(elements, shards, workers, 0.2, INT8_BF16))
    assert rate.cycles >= workers
    assert len(rate.by_client) == workers
    assert all(each > 0 for each in rate.by_client)
    assert rate.gigabytes_per_second(elements) == pytest.approx(sum(rate.by_client) * elements * 8 / 1e9)
    counted = {name: sum(shard[name] for shard in rate.shards) for name in exchange.COUNTED}
    assert counted["push_elements"] == rate.cycles * elements
    assert counted["pull_elements"] == rate.cycles * elements
    part = elements // shards
    assert counted["push_payload_bytes"] == rate.cycles * shards * make_encoding("int8").frame_bytes(part)
    assert counted["pull_payload_bytes"] == rate.cycles * elements * 2
    # Nothing, where compiling the kernels took more than serving so small a model.
    assert all(0 <= shard[exchange.PEAK] < 500 for shard in rate.shards)


def test_a_rate_with_a_journal_writes_every_update_down(processes: Processes) -> None:
    elements = 400_000  # past what a commit gathers
    rate = exchange.measure(exchange.Setting(elements, 2, 1, 0.2, INT8_BF16, log="journal"))
    counted = {name: sum(shard[name] for shard in rate.shards) for name in exchange.COUNTED}
    assert counted["push_elements"] == rate.cycles * elements
    assert 1.0 < counted["journal_bytes"] / counted["push_payload_bytes"] < 1.1


def test_a_rate_with_backups_stores_every_record_twice(processes: Processes) -> None:
    elements = 20_000
    rate = exchange.measure(exchange.Setting(elements, 3, 2, 0.2, INT8_BF16, log="journal", backups=1))
    for shard in rate.shards:
        assert shard["record"] >= rate.cycles  # the pushes of all workers, and what the timer published
        # What the timer publishes at the end may be on its way still; what was acknowledged is stored.
        assert shard["stored"] >= rate.cycles


def test_a_setting_that_no_job_may_have_starts_no_process(processes: Processes) -> None:
    with pytest.raises(InputError, match="momentumm"):
        exchange.measure(exchange.Setting(1000, 1, 1, 0.1, INT8_BF16, {"name": "momentumm"}))


@pytest.mark.parametrize(("frame_bytes", "is_shared"), [(0, False), (200_000, False), (1, True), (200_000, True)])
def test_the_wire_carries_frames_of_every_size_both_ways(
    frame_bytes: int, is_shared: bool, processes: Processes
) -> None:
    if is_shared and sys.platform != "linux":
        pytest.skip("memory is shared on Linux only")
    rate = wire.measure(wire.WireSetting(frame_bytes, 3, 0.05, is_shared))
    assert rate.round_trips_per_second > 0
    assert rate.gigabytes_per_second(frame_bytes) == rate.round_trips_per_second * 2 * frame_bytes / 1e9


def test_memory_that_cannot_be_shared_is_told_instead_of_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "shared_memory", lambda is_on: {"PARAMSERVER_SHARED_MEMORY": "off"})
    with pytest.raises(MeasurementError, match="asking cannot go on: two processes of this machine could not share"):
        wire.measure(wire.WireSetting(5000, 1, 0.05, True))


def seconds_of(work: str) -> float:
    cells = codec.measure(["int8"], [64], [1000], works=[work], rounds=2)
    assert [(cell.encoding, cell.work, cell.elements) for cell in cells] == [("int8/64", work, 1000)]
    return cells[0].seconds


@pytest.mark.parametrize(
    ("work", "method"),
    [("encode", "encode"), ("publish", "encode_delta"), ("decode", "decode"), ("add", "decode_add")],
)
def test_codec_times_the_method_that_the_exchange_calls(
    work: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0 < seconds_of(work) < 0.002
    # One that takes longer shows: the figure is its time, not a constant.
    kind = type(make_encoding("int8"))
    slower = getattr(kind, method)

    def dawdle(*arguments: Any, **named: Any) -> Any:
        until = time.thread_time() + 0.002
        while time.thread_time() < until:
            pass
        return slower(*arguments, **named)

    monkeypatch.setattr(kind, method, dawdle)
    assert seconds_of(work) >= 0.002


def test_codec_measures_every_work_of_every_encoding_tile_and_size() -> None:
    optimizers = [{"name": "adagrad"}, {"name": "sgd"}]
    cells = codec.measure(["bf16", "int4"], [64, 128], [1000, 3000], optimizers=optimizers, rounds=3)
    assert [(cell.elements, cell.encoding, cell.work) for cell in cells] == [
        (elements, identifier, work)
        for elements in (1000, 3000)
        for identifier in ("bf16", "int4/64", "int4/128")
        for work in (*codec.WORKS, "adagrad", "sgd")
    ]
    assert cells[-1].bits == 8 * make_encoding("int4", EncodingOptions(tile=128)).frame_bytes(3000) / 3000
    for cell in cells:
        assert min(cell.seconds, cell.memcpy_seconds, cell.gigabytes_per_second) > 0
        assert len(cell.ratios) == 3
        assert cell.ratio == cell.seconds / cell.memcpy_seconds
    assert [len(row) for row in codec.by_encoding(cells)] == [6] * 6


def test_codec_works_in_the_blocks_of_the_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    kind = type(make_encoding("bf16"))
    encode = kind.encode

    def noted(self: Any, values: Any, *arguments: Any, **named: Any) -> int:
        encoded.append(values.size)
        return encode(self, values, *arguments, **named)

    monkeypatch.setattr(kind, "encode", noted)
    codec.measure(["bf16"], [64], [2 * BLOCK_ELEMENTS + 5], works=["encode"], rounds=1)
    assert encoded[:3] == [BLOCK_ELEMENTS, BLOCK_ELEMENTS, 5]
    assert set(encoded) == {BLOCK_ELEMENTS, 5}


def test_what_codec_publishes_goes_on_moving(monkeypatch: pytest.MonkeyPatch) -> None:
    distances: list[float] = []
    kind = type(make_encoding("int8"))
    publish = kind.encode_delta

    def noted(self: Any, weights: Any, published: Any, *arguments: Any) -> int:
        distances.append(float(abs(weights - published).max()))
        return publish(self, weights, published, *arguments)

    monkeypatch.setattr(kind, "encode_delta", noted)
    codec.measure(["int8"], [64], [1000], works=["publish"], rounds=2)
    assert min(distances) > 1


# -------------------------------------------------------------------------- the command


def test_help_of_bench_imports_nothing_heavy() -> None:
    code = (
        "import sys; from paramserver.cli.__main__ import main; main(['bench', 'exchange', '--help']);"
        "heavy = {'torch', 'numba', 'numpy', 'zmq', 'yaml'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--push" in done.stdout


def test_bench_codec_measures_every_installed_encoding(capsys: Capture) -> None:
    assert main(["bench", "codec", "--sizes", "1k,2k", "--rounds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["python"]
    assert {(row["encoding"].partition("/")[0], row["elements"]) for row in found["results"]} == {
        (name, elements) for name in encoding_names() for elements in (1000, 2000)
    }
    for row in found["results"]:
        assert min(row[f"{work}_over_memcpy"] for work in ("encode", "publish", "apply")) > 0


def test_bench_codec_prints_a_table_and_the_machine(capsys: Capture) -> None:
    assert main(["bench", "codec", "--sizes", "1k", "--rounds", "1", "--encodings", "bf16"]) == 0
    shown = capsys.readouterr().out
    assert "bf16" in shown
    assert "16.00" in shown
    assert "numba" in shown
    assert "{" not in shown


def test_bench_exchange_and_wire_print_json(capsys: Capture, processes: Processes) -> None:
    arguments = ["--rounds", "1", "--seconds", "0.05", "--json"]
    ways = ["--push", "{encoding: int8, tile: 256}", "--pull", "bf16"]
    assert main(["bench", "exchange", "--sizes", "5k", *ways, *arguments]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["push"] == {"encoding": "int8", "tile": 256}
    assert found["results"][0]["gigabytes_per_second"][0] > 0
    assert main(["bench", "wire", "--sizes", "8192", "--in-flight", "2", "--sockets-only", *arguments]) == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert (row["frame_bytes"], row["in_flight"], row["through"]) == (8192, 2, "sockets")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["codec", "--encodings", "int9"], "did you mean 'int8'"),
        (["codec", "--sizes", "many"], "--sizes: found 'many'"),
        (["codec", "--tile", "7"], "power of two"),
        (["codec", "--optimizer", "sdg"], "optimizer.name: found 'sdg'"),
        (["exchange", "--push", "int9"], "did you mean 'int8'"),
        (["exchange", "--sizes", "1"], "from 2 to"),
        (["exchange", "--optimizer", "sdg"], "optimizer.name"),
        (["wire", "--sizes", "9M"], "at most"),
        (["wire", "--in-flight", "100"], "at most 64"),
        (["exchange", "--rounds", "0"], "--rounds"),
        (["exchange", "--log", "journl"], "did you mean 'journal'?"),
        (["exchange", "--backups", "1"], "use --log journal and at least 2 shards"),
        (["exchange", "--backups", "1", "--log", "journal", "--shards", "1"], "at least 2 shards"),
    ],
)
def test_what_the_user_gave_wrong_is_one_message_and_exit_code_2(
    arguments: list[str], part: str, capsys: Capture, processes: Processes
) -> None:
    assert main(["bench", *arguments]) == 2
    shown = capsys.readouterr()
    assert part in shown.err
    assert shown.out == ""


def test_a_measurement_that_fails_is_exit_code_1(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(setting: object) -> Any:
        raise MeasurementError("shard-000 ended")

    monkeypatch.setattr(exchange, "measure", broken)
    assert main(["bench", "exchange", "--sizes", "1k"]) == 1
    assert capsys.readouterr().err == "paramserver: shard-000 ended\n"
