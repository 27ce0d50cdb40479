"""Training data: order, mixtures, masks, packing, sharding over processes, exact resume, faults."""

import json
import random
import sys
import threading
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen3_jax.train.data import DataConfig, DataError, Loader, Source, merge
from qwen3_jax.train.data.examples import Encoder
from qwen3_jax.train.data.order import Mixture, Permutation
from qwen3_jax.train.data.records import BadRecord, Records
from tests import tiny
from tests.run import Network
from tests.text_folders import DEMO, each_folder, ours, template, theirs


def write(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def numbered(path: Path, count: int, *, seed: int = 0, longest: int = 60) -> str:
    """Write records of 2 to `longest` tokens, each beginning with two that say which it is (vocabulary 96)."""
    draw = random.Random(seed)
    sizes = [draw.randint(0, longest - 2) for _ in range(count)]
    return write(
        path, [{"tokens": [i // 96, i % 96, *(draw.randrange(96) for _ in range(n))]} for i, n in enumerate(sizes)]
    )


def loader(config: DataConfig, *, batch: int = 4, length: int = 64, seed: int = 3, **options) -> Loader:
    return Loader(config, None, None, batch=batch, length=length, seed=seed, vocab_size=96, **options)


def ids_of(batches) -> list[str]:
    return [id_ for batch in batches for row in batch.ids for id_ in row]


def same(a, b) -> bool:
    return a.ids == b.ids and all(np.array_equal(a.arrays[name], b.arrays[name]) for name in a.arrays)


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 1000, 4097])
def test_a_permutation_is_one(size):
    shuffled = [Permutation(size, 7)[i] for i in range(size)]
    assert sorted(shuffled) == list(range(size))
    assert size < 16 or shuffled != [Permutation(size, 8)[i] for i in range(size)]


def test_a_permutation_is_uniform():
    """Chi-square of where each of 7 elements goes under 7000 keys: 36 degrees of freedom, p = 1e-6 at 90."""
    counts = np.zeros((7, 7))
    for key in range(7000):
        shuffle = Permutation(7, key)
        for i in range(7):
            counts[i, shuffle[i]] += 1
    assert ((counts - 1000) ** 2 / 1000).sum() < 90


def test_a_mixture_is_exact_at_every_moment():
    weights = [0.5, 0.3, 0.15, 0.05]
    mixture = Mixture(weights, seed=5)
    for lane in range(3):
        counts = [0] * 4
        for j in range(2000):
            source, count = mixture.draw(lane, j)
            assert count == counts[source]  # numbered without a gap
            assert [mixture.count(lane, i, j) for i in range(4)] == counts
            counts[source] += 1
            assert all(abs(c - w * (j + 1)) <= i + 1 for i, (c, w) in enumerate(zip(counts, weights, strict=True)))
    assert [Mixture([0.1, 0.2], 0).count(0, i, 3_000_000) for i in (0, 1)] == [1_000_000, 2_000_000]


def test_lanes_do_not_draw_the_same_source_at_the_same_time():
    mixture = Mixture([1, 1], seed=0)
    firsts = [mixture.draw(lane, 0)[0] for lane in range(64)]
    assert 16 < sum(firsts) < 48


# --- examples ---------------------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
CONVERSATIONS = {
    "plain": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}],
    "thinking": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "reasoning_content": "one and one", "content": "2"},
    ],
    "spelled thinking": [
        {"role": "user", "content": "say <think>"},
        {"role": "assistant", "content": "<think>\nwell\n</think>\n\n<think> is a tag"},
    ],
    "turns": [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "reasoning_content": "dropped by the template", "content": "2"},
        {"role": "user", "content": "assistant\nand then?"},
        {"role": "assistant", "reasoning_content": "kept", "content": "3"},
    ],
    "tools": [
        {"role": "user", "content": "call"},
        {"role": "assistant", "reasoning_content": "I must call", "content": "calling", "tool_calls": [CALL]},
        {"role": "tool", "content": "41"},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "it is 42 조 日本"},
        {"role": "user", "content": "more?"},
    ],
}


def marked(source: str) -> str:
    """Put transformers' `generation` block around all that the template writes for an assistant after its header."""
    begin = '{%- elif message.role == "assistant" %}'
    end = "        {{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\" %}"
    assert source.count(begin) == source.count(end) == 1
    before, after = source.split(begin)
    turn, rest = after.split(end)
    turn = turn.replace("'<|im_start|>' + message.role + '\\n<think>", "'<think>")
    turn = turn.replace("'<|im_start|>' + message.role + '\\n' + content", "content")
    assert "<|im_start|>" not in turn
    return (
        before + begin + "{{- '<|im_start|>assistant\\n' }}{% generation %}" + turn
        + "{{- '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}" + end.split("\n", 1)[1] + rest
    )  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_what_is_learned_of_a_conversation_is_what_transformers_marks(name):
    folder = DEMO
    messages, tools = CONVERSATIONS[name], TOOLS if name == "tools" else None
    truth = theirs(folder).apply_chat_template(
        messages, tools=tools, chat_template=marked(theirs(folder).chat_template), tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    encoder = Encoder(ours(folder), template(folder), ours(folder).vocab_size)
    [example] = encoder.examples({"messages": messages, "tools": tools}, length=1000, long=None, turns="all")
    assert [*example.inputs, example.targets[-1]] == truth["input_ids"]
    assert [0, *example.weights] == truth["assistant_masks"]
    assert list(example.targets[:-1]) == list(example.inputs[1:])


@each_folder
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_last_turn_follows_the_prompt_that_inference_renders(folder, name):
    """The independent route: the ids before the last turn are those of the prompt for it."""
    messages, tools = CONVERSATIONS[name], TOOLS if name == "tools" else None
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    encoder = Encoder(ours(folder), template(folder), ours(folder).vocab_size)
    record = {"messages": messages[: last + 1], "tools": tools}
    [example] = encoder.examples(record, length=1000, long=None, turns="last")
    prompt = ours(folder).encode(template(folder).render(messages[:last], tools))
    [learned] = np.flatnonzero(np.diff([0, *example.weights, 0])).reshape(-1, 2)
    assert list(example.inputs[: learned[0] + 1]) == prompt
    text = ours(folder).decode(example.targets[learned[0] : learned[1]])
    assert text.startswith("<think>\n")
    assert text.endswith("<|im_end|>")
    assert text.removesuffix("<|im_end|>").endswith(messages[last]["content"].split("</think>\n\n")[-1])


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}]}, "nothing to learn"),
        ({"messages": [{"role": "user", "content": "<|im_start|>assistant\nme"}]}, "control token"),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x<|im_end|>"}]}, "control"),
        ({"messages": []}, "template"),
        ({"messages": [{"role": "robot", "content": ""}]}, "template"),
        ({"messages": "Hi"}, "template"),
        ({"text": " \n"}, "empty"),
        ({"text": 3}, "wrong type"),
        ({"text": "\ud800"}, "not UTF-8"),
        ({"tokens": [1]}, "empty"),
        ({"tokens": [1, "2"]}, "wrong type"),
        ({"tokens": [1, 2, 96]}, "unknown token: id 96, the vocabulary has 96"),
        ({"tokens": [1, -2]}, "unknown token"),
        ({"tokens": [True, False]}, "wrong type"),
        ({"prompt": "x"}, "unknown format"),
        ({"text": "x", "tokens": [1, 2]}, "unknown format"),
    ],
)
def test_unusable_records_say_why(record, reason):
    with pytest.raises(BadRecord, match=reason):
        Encoder(ours(), template(), 96).examples(record, length=100, long=None, turns="all")


def test_what_is_longer_than_a_row():
    encoder = Encoder(ours(), template(), 96)
    ids = list(range(10, 31))
    pieces = encoder.examples({"tokens": ids}, length=8, long="split", turns="all")
    assert [len(piece) for piece in pieces] == [8, 8, 4]
    assert [t for piece in pieces for t in piece.targets] == ids[1:]  # every token but the first is learned once
    assert [t for piece in pieces for t in piece.inputs] == ids[:-1]
    [piece] = encoder.examples({"tokens": ids}, length=8, long="truncate", turns="all")
    assert list(piece.targets) == ids[1:9]
    with pytest.raises(BadRecord, match="too long: 20 positions, a row has 8"):
        encoder.examples({"tokens": ids}, length=8, long="skip", turns="all")
    with pytest.raises(BadRecord, match="too long"):
        encoder.examples({"messages": CONVERSATIONS["plain"]}, length=8, long=None, turns="all")


def test_a_text_ends_with_the_end_of_text():
    [example] = Encoder(ours(), None, 96).examples({"text": "abc"}, length=100, long=None, turns="all")
    assert example.targets[-1] == ours().special["<|endoftext|>"]
    assert example.weights.all()


# --- packing ----------------------------------------------------------------------------------------------------------


def test_rows_hold_their_examples_whole(tmp_path):
    path = numbered(tmp_path / "a.jsonl", 200)
    records = [json.loads(line)["tokens"] for line in Path(path).read_text().splitlines()]
    config = DataConfig((Source("a", path),), epochs=1)
    filled = []
    for batch in loader(config):
        for r, row in enumerate(batch.ids):
            arrays = {name: values[r] for name, values in batch.arrays.items()}
            assert list(np.unique(arrays["segment_ids"][arrays["segment_ids"] > 0])) == list(range(1, len(row) + 1))
            for segment, id_ in enumerate(row, start=1):
                at = arrays["segment_ids"] == segment
                tokens = records[int(id_.split(":")[1].split("@")[0])]
                assert np.ptp(np.flatnonzero(at)) == at.sum() - 1
                assert list(arrays["tokens"][at]) == tokens[:-1]
                assert list(arrays["targets"][at]) == tokens[1:]
                assert list(arrays["positions"][at]) == list(range(at.sum()))
            padding = arrays["segment_ids"] == 0
            assert not arrays["weights"][padding].any()
            assert not arrays["positions"][padding].any()
        filled.append((batch.arrays["segment_ids"] > 0).mean())
    assert np.mean(filled[:8]) > 0.95  # before the last ones of a short list


def test_packing_is_no_worse_than_grains(tmp_path):
    """The same lengths through grain's first-fit packer with as many open rows."""
    grain = pytest.importorskip("grain")
    from grain.experimental import FirstFitPackIterDataset

    path = numbered(tmp_path / "a.jsonl", 400)
    sizes = [len(json.loads(line)["tokens"]) - 1 for line in Path(path).read_text().splitlines()]
    packed = FirstFitPackIterDataset(
        grain.MapDataset.source(sizes).seed(1).shuffle().map(lambda n: {"x": np.ones(n)}).to_iter_dataset(),
        length_struct={"x": 64}, num_packing_bins=8,
    )  # fmt: skip
    theirs_rows = sum(1 for _ in packed)
    batches = list(loader(DataConfig((Source("a", path),), epochs=1), batch=1))
    assert len(batches) <= theirs_rows


def test_the_packed_loss_is_the_unpacked_loss(tmp_path):
    folder, _ = tiny.save(tmp_path / "model")
    network = Network(folder)
    path = numbered(tmp_path / "a.jsonl", 30)
    [batch, *_] = loader(DataConfig((Source("a", path),), epochs=1), batch=2)
    records = [json.loads(line)["tokens"] for line in Path(path).read_text().splitlines()]

    def losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return -np.take_along_axis(np.asarray(jax.nn.log_softmax(jnp.asarray(logits))), targets[..., None], -1)[..., 0]

    a = batch.arrays
    packed = network.logits(a["tokens"], positions=a["positions"], segment_ids=a["segment_ids"])
    total = (losses(packed, a["targets"]) * a["weights"]).sum()
    chosen = [records[int(id_.split(":")[1].split("@")[0])] for row in batch.ids for id_ in row]
    assert len(chosen) > 3
    alone = np.zeros((len(chosen), 64), np.int32)
    for row, tokens in zip(alone, chosen, strict=True):
        row[: len(tokens)] = tokens
    each = losses(network.logits(alone)[:, :-1], alone[:, 1:])
    expected = sum(row[: len(tokens) - 1].sum() for row, tokens in zip(each, chosen, strict=True))
    np.testing.assert_allclose(total, expected, rtol=1e-6)


# --- the stream -------------------------------------------------------------------------------------------------------


def test_every_record_once_an_epoch_and_another_order_in_the_next(tmp_path):
    sources = tuple(Source(name, numbered(tmp_path / f"{name}.jsonl", n)) for name, n in [("a", 150), ("b", 37)])
    ids = ids_of(loader(DataConfig(sources, epochs=2)))
    assert Counter(ids) == {
        f"{n}:{i}@{e}": 1 for n, size in [("a", 150), ("b", 37)] for i in range(size) for e in (0, 1)
    }
    first = [id_[:-2] for id_ in ids if id_.endswith("@0")]
    assert first != [id_[:-2] for id_ in ids if id_.endswith("@1")]
    assert ids == ids_of(loader(DataConfig(sources, epochs=2)))
    assert ids != ids_of(loader(DataConfig(sources, epochs=2), seed=4))
    unshuffled = ids_of(loader(DataConfig(sources[:1], epochs=1, shuffle=False), batch=1, length=9000))
    assert unshuffled == [f"a:{i}@0" for i in range(150)]


def test_weights_are_shares_of_the_examples(tmp_path):
    """Records of b are many times as long as a's: rows fill at other paces, the shares stay."""
    short = numbered(tmp_path / "a.jsonl", 500, longest=4)
    long = numbered(tmp_path / "b.jsonl", 20, longest=64)
    data = loader(DataConfig((Source("a", short, weight=0.75), Source("b", long, weight=0.25))), batch=8)
    counts = Counter(id_[0] for id_ in ids_of(next(data) for _ in range(100)))
    assert counts["a"] / counts.total() == pytest.approx(0.75, abs=0.01)
    data.close()


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_make_the_rows_of_one(tmp_path, processes):
    config = DataConfig((Source("a", numbered(tmp_path / "a.jsonl", 300)),))
    whole = loader(config, batch=8)
    parts = [loader(config, batch=8, process=p, processes=processes) for p in range(processes)]
    for _ in range(10):
        expected, found = next(whole), [next(part) for part in parts]
        assert expected.ids == sum((batch.ids for batch in found), ())
        for name, values in expected.arrays.items():
            np.testing.assert_array_equal(values, np.concatenate([batch.arrays[name] for batch in found]))
    assert merge([part.state() for part in parts]) == whole.state()

    # Another number of processes goes on from there, and so does one.
    state = json.loads(json.dumps(merge([part.state() for part in parts])))
    others = [loader(config, batch=8, process=p, processes=8 // processes) for p in range(8 // processes)]
    for other in others:
        other.restore(state)
    for _ in range(5):
        assert next(whole).ids == sum((next(other).ids for other in others), ())
    with pytest.raises(DataError, match="lacks row"):
        parts[1].restore(parts[0].state())
    for data in (whole, *parts, *others):
        data.close()


def test_processes_end_together(tmp_path):
    config = DataConfig((Source("a", numbered(tmp_path / "a.jsonl", 21)),), epochs=1)
    with pytest.raises(DataError, match="need `anyone`"):
        loader(config, process=0, processes=2)
    barrier = threading.Barrier(2, timeout=30)
    said: list[bool] = [False, False]
    batches: list[list] = [[], []]

    def run(process: int) -> None:
        def anyone(mine: bool) -> bool:
            said[process] = mine
            barrier.wait()
            result = any(said)
            barrier.wait()
            return result

        with loader(config, batch=2, length=64, process=process, processes=2, anyone=anyone) as data:
            batches[process] += data

    threads = [threading.Thread(target=run, args=(process,)) for process in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(batches[0]) == len(batches[1])
    assert sorted(ids_of(batches[0] + batches[1])) == sorted(f"a:{i}@0" for i in range(21))


@pytest.mark.parametrize("prefetch", [0, 3])
def test_resume_is_exact_at_every_batch(tmp_path, prefetch):
    sources = (
        Source("a", numbered(tmp_path / "a.jsonl", 60), long="split"),
        Source("b", numbered(tmp_path / "b.jsonl", 25, longest=200), long="split"),
    )
    config = DataConfig(sources, epochs=2, prefetch=prefetch)
    data = loader(config, length=48)
    states, batches = [json.dumps(data.state())], []
    for batch in data:
        batches.append(batch)
        states.append(json.dumps(data.state()))
    assert len(batches) > 20
    assert max(map(len, states)) < 8 * 1024
    for at in range(0, len(states), 3):
        again = loader(config, length=48)
        again.restore(json.loads(states[at]))
        rest = list(again)
        assert len(rest) == len(batches) - at
        assert all(same(a, b) for a, b in zip(rest, batches[at:], strict=True))
        assert json.dumps(again.state()) == states[-1]


def test_a_state_is_refused_by_other_data(tmp_path):
    path = numbered(tmp_path / "a.jsonl", 30)
    config = DataConfig((Source("a", path),))
    state = loader(config).state()
    for other, key in [
        (loader(config, seed=4), "seed 3, this run has 4"),
        (loader(config, batch=8), "batch 4, this run has 8"),
        (loader(config, length=32), "length 64, this run has 32"),
        (loader(DataConfig((Source("a", path),), lookahead=2)), "lookahead 32, this run has 2"),
    ]:
        with pytest.raises(DataError, match=key):
            other.restore(state)
    with open(path, "a") as file:
        file.write('{"tokens": [1, 2, 3]}\n')
    with pytest.raises(DataError, match=r"'records': 30.*'records': 31"):
        loader(config).restore(state)


# --- faults -----------------------------------------------------------------------------------------------------------

FAULTS = {
    "torn": (b'{"tokens": [1, 2', "not JSON"),
    "bad UTF-8": (b'{"tokens": [1, 2], "x": "\xff\xfe"}', "not UTF-8"),
    "empty": (b"", "empty"),
    "empty document": (b'{"tokens": []}', "empty"),
    "oversize": (b'{"tokens": [' + b"1, " * 2000 + b"1]}", "too large"),
    "outside the vocabulary": (b'{"tokens": [1, 96]}', "unknown token"),
    "another type": (b"[1, 2]", "not an object"),
    "nested deeply": (b"[" * 3000, "not JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_record_is_skipped_and_moves_no_other(tmp_path, fault, caplog):
    path = Path(numbered(tmp_path / "a.jsonl", 80))
    config = DataConfig((Source("a", str(path)),), epochs=1, max_record_bytes=4000)
    good = [id_ for batch in loader(config, length=4096, batch=2) for id_ in batch.ids[1]]
    lines = path.read_bytes().splitlines()
    bad = {11, 40, 79}
    for i in bad:
        lines[i] = FAULTS[fault][0]
    path.write_bytes(b"\n".join(lines) + b"\n")
    data = loader(config, length=4096, batch=2)
    found = [id_ for batch in data for id_ in batch.ids[1]]
    names = {f"a:{i}@0" for i in bad}
    assert found == [id_ for id_ in good if id_ not in names]
    assert data.skipped == {FAULTS[fault][1]: 3}
    assert {name for name, _ in data.bad_records} == names
    assert all(name in caplog.text for name in names)

    with pytest.raises(DataError, match=rf"a:\d+@0: {FAULTS[fault][1]}.*bad_records to skip"):
        list(loader(DataConfig(config.sources, epochs=1, max_record_bytes=4000, bad_records="stop")))


def test_counts_of_bad_records_resume_too(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"tokens": [1, 2, 3]}, {"tokens": []}] * 20)
    config = DataConfig((Source("a", path),), epochs=3)
    data = loader(config, length=8, batch=1)
    batches = [next(data) for _ in range(6)]
    state = data.state()
    assert len(batches) == 6
    assert 0 < data.skipped["empty"] < 60
    again = loader(config, length=8, batch=1)
    again.restore(state)
    assert again.skipped == data.skipped
    list(again)
    assert again.skipped == {"empty": 60}
    data.close()


def test_data_without_a_good_record_stops(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"tokens": []}] * 20)
    with pytest.raises(DataError, match="records in a row are bad"):
        next(loader(DataConfig((Source("a", path),))))


def test_a_file_that_shrinks_during_the_run(tmp_path):
    path = numbered(tmp_path / "a.jsonl", 50)
    data = loader(DataConfig((Source("a", path),), epochs=1, prefetch=0))
    with open(path, "r+b") as file:
        file.truncate(500)
    list(data)
    assert data.skipped["unreadable"] > 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "nothing-*.jsonl"}, "no file is named nothing"),
        ({"path": "data.csv"}, "ends in .jsonl, .txt or .parquet, this one in '.csv'"),
        ({"path": "empty.jsonl"}, "has no records"),
        ({"weight": 0}, "weight is 0: give a number above 0"),
        ({"weight": 0.5}, "leave out one of them"),
        ({"long": "cut"}, "use skip, split or truncate"),
        ({"name": ""}, "a name of its own"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    numbered(tmp_path / "a.jsonl", 3)
    (tmp_path / "data.csv").write_text("x")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=message):
        loader(DataConfig((Source(**{"name": "a", "path": "a.jsonl"} | change),), epochs=1))


def test_text_files_and_patterns(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"first of {i}\r\nsecond of {i}" + ("\n" if i else ""))
    records = Records("t", str(tmp_path / "*.txt"), max_bytes=100)
    assert [records.read(i)["text"] for i in range(len(records))] == [
        f"{which} of {i}" for i in range(3) for which in ("first", "second")
    ]
    config = DataConfig((Source("t", str(tmp_path / "*.txt")),), epochs=1)
    [batch] = Loader(config, ours(), None, batch=1, length=200, seed=0)
    assert len(batch.ids[0]) == 6


def test_parquet(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(DataError, match="Parquet needs pyarrow: pip install pyarrow"):
            Records("a", str(path), max_bytes=100)
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    with pytest.raises(DataError, match="not a Parquet file"):
        Records("a", str(path), max_bytes=100)
    messages = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "x"}] for i in range(50)]
    parquet.write_table(pyarrow.table({"messages": messages}), path, row_group_size=7)
    records = Records("a", str(path), max_bytes=100)
    assert [records.read(i)["messages"] for i in range(len(records))] == messages
    data = Loader(DataConfig((Source("a", str(path)),), epochs=1), ours(), template(), batch=2, length=64, seed=0)
    assert len(ids_of(data)) == 50


def test_the_thread_hands_on_errors_and_ends(tmp_path, monkeypatch):
    config = DataConfig((Source("a", numbered(tmp_path / "a.jsonl", 30)),))
    before = set(threading.enumerate())
    data = loader(config)
    next(data)
    assert {thread.name for thread in set(threading.enumerate()) - before} >= {"qwen3_jax data"}
    data.close()
    assert set(threading.enumerate()) <= before

    def broken(*_, **__):
        raise RuntimeError("no luck")

    monkeypatch.setattr(Encoder, "examples", broken)
    data = loader(config)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no luck"):
            next(data)
    data.close()


def test_reading_does_not_load_the_file(tmp_path):
    """A file of 40 MB costs its index: 8 bytes a line."""
    import tracemalloc

    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": "x" * 4000}) + "\n"
    path.write_text(line * 10_000)
    tracemalloc.start()
    records = Records("a", str(path), max_bytes=1 << 20)
    records.read(9_999)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(records) == 10_000
    assert held < 1 << 20


def test_only_the_last_turn_is_learned_if_so_asked(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": CONVERSATIONS["turns"]}] * 8)
    config = DataConfig((Source("a", path, turns="last"),), epochs=1)
    [batch] = Loader(config, ours(), template(), batch=1, length=4096, seed=0)
    assert len(batch.ids[0]) == 8
    learned = batch.arrays["targets"][batch.arrays["weights"] > 0]
    assert ours().decode(learned[: len(learned) // 8]) == "<think>\nkept\n</think>\n\n3<|im_end|>"
