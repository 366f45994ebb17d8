"""core.shards: building that is killed, damage that is named, two builders at once, and what is read back."""
import json
import os
import pickle
import signal

import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from torch.utils.data import DataLoader

from kilobench.core.recipe import UserError
from kilobench.core.run import sha256_of
from kilobench.core.shards import ShardIndex, Shards, build_shards, pack, unpack

N, SIZE = 50, 16  # four shards, the last of two rows

TEACHER = """
import sys, torch
from pathlib import Path
from kilobench.core.shards import Shards, build_shards
def rows_of(rows):
    one = lambda i: torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(i))
    label = torch.tensor(list(rows))
    return {"image": torch.stack([one(i) for i in rows]), "label": label, "flag": label % 2 == 0}
"""
known: dict = {}
exec(TEACHER, known)
rows_of = known["rows_of"]


def line(act) -> str:
    "The UserError's text, which is one line."
    with pytest.raises(UserError) as e: act()
    assert str(e.value) and "\n" not in str(e.value)
    return str(e.value)


def make(dir, teacher=rows_of, **more): return build_shards(dir, teacher, **(dict(n=N, shard_size=SIZE, progress=False) | more))


class Asked:
    "The teacher, noting what it was asked for."
    def __init__(self): self.ranges = []
    def __call__(self, rows):
        self.ranges.append((rows.start, rows.stop))
        return rows_of(rows)


@pytest.fixture(scope="module")
def whole(tmp_path_factory): return make(tmp_path_factory.mktemp("whole") / "s")


def files(dir): return {p.name: sha256_of(p) for p in sorted(dir.glob("*.safetensors"))}


# What is read back

def test_rows_come_back_in_the_order_asked_for(whole):
    ask = [49, 0, 17, 17, -1, 15, 16]
    got, true = whole.fetch(ask), rows_of(range(N))
    assert got["label"].tolist() == [49, 0, 17, 17, 49, 15, 16] and got["label"].dtype == torch.int64
    assert torch.equal(got["image"], true["image"].half().float()[ask]) and got["image"].dtype == torch.float32
    assert torch.equal(got["flag"], true["flag"][ask]) and got["flag"].dtype == torch.bool
    assert len(whole) == N and whole.keys == ["image", "label", "flag"] and whole.meta == {}
    assert whole[3]["label"].shape == () and whole[-1]["label"] == 49 and whole[3]["image"].shape == (3, 4, 4)


@pytest.mark.parametrize(
    "ask", [range(10, 40), torch.arange(10, 40), torch.arange(10, 40).numpy(), torch.arange(10, 40, dtype=torch.int32)]
)
def test_any_kind_of_row_numbers(whole, ask): assert whole.fetch(ask, keys=["label"])["label"].tolist() == list(range(10, 40))


def test_rows_beyond_the_end_and_strange_keys(whole):
    for ask in ([50], [-51], [0, 50]):
        with pytest.raises(IndexError): whole.fetch(ask)
    for ask in ([0.5], [True, False]):
        with pytest.raises(TypeError): whole.fetch(ask)
    assert "did you mean 'image'" in line(lambda: whole.fetch([0], keys=["imgae"]))
    empty = whole.fetch([])
    assert empty["image"].shape == (0, 3, 4, 4) and empty["image"].dtype == torch.float32 and whole.fetch(range(0))["label"].shape == (0,)
    assert [int(r["label"]) for r in whole] == list(range(N)), "iteration ends at an IndexError"


def test_a_batch_is_a_copy_of_the_file(whole):
    before = files(whole.dir)
    first = whole.fetch(range(SIZE))
    for v in first.values(): v.zero_()
    assert whole.fetch(range(SIZE))["label"].tolist() == list(range(SIZE)) and files(whole.dir) == before


def test_a_dataloader_with_workers_reads_them(whole):
    whole.fetch([0])
    loader = DataLoader(whole, batch_size=8, num_workers=2)
    assert [i for b in loader for i in b["label"].tolist()] == list(range(N))
    again = pickle.loads(pickle.dumps(whole))
    assert again._mapped == {} and again.fetch([20])["label"].tolist() == [20]


def test_files_are_mapped_not_loaded(tmp_path, start):
    code = TEACHER + """
big = build_shards(sys.argv[1], lambda rows: {"x": torch.zeros(len(rows), 1 << 20)}, n=64, shard_size=32, progress=False)
private = lambda: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024
shards = Shards.open(sys.argv[1]); before = private()
shards.fetch([0])
print(private() - before, sum(s.bytes for s in shards.index.shards.values()))
"""
    if not os.path.exists("/proc/self/status"): pytest.skip("no /proc")
    used, size = map(int, start(code, tmp_path / "s", before="").communicate()[0].split())
    assert size == pytest.approx(128 << 20, rel=0.01) and used < size / 4


# Storing

floats = arrays("float32", st.integers(1, 20), elements=st.floats(0, 1, width=32))


@settings(max_examples=100, deadline=None)
@given(floats)
def test_storing_errs_no_more_than_it_says(values):
    x = torch.from_numpy(values)
    assert torch.equal(unpack(*pack(x, "fp32")), x)
    assert (unpack(*pack(x, "fp16")) - x).abs().le(x * 2**-11 + 2**-25).all()
    assert (unpack(*pack(x, "uint8")) - x).abs().max() <= 0.5 / 255 + 1e-7
    assert torch.equal(unpack(*pack(unpack(*pack(x, "uint8")), "uint8")), unpack(*pack(x, "uint8"))), "8 bits once are 8 bits for ever"


def test_whole_numbers_and_truth_are_kept():
    for x in (torch.tensor([2**40, -1]), torch.tensor([True, False]), torch.tensor([0, 255], dtype=torch.uint8)):
        for store in ("fp16", "fp32", "keep"):
            y, how = pack(x, store)
            assert how == "keep" and torch.equal(unpack(y, how), x) and unpack(y, how).dtype == x.dtype
    assert unpack(*pack(torch.tensor([0, 255], dtype=torch.uint8), "uint8")).tolist() == [0.0, 1.0]
    assert unpack(*pack(torch.tensor([1e300], dtype=torch.float64), "keep")).dtype == torch.float64
    assert pack(torch.tensor([float("nan"), float("inf")]), "fp32")[0].isfinite().sum() == 0


@pytest.mark.parametrize(
    "bad, store",
    [(float("nan"), "fp16"), (float("inf"), "fp16"), (7e4, "fp16"), (float("nan"), "uint8"), (1.01, "uint8"), (-0.01, "uint8")],
)
def test_what_cannot_be_stored_is_named_with_its_row(tmp_path, bad, store):
    def teacher(rows):
        made = rows_of(rows)
        if 20 in rows: made["image"][20 - rows.start, 1, 2, 3] = bad
        return made
    said = line(lambda: make(tmp_path / "s", teacher, store={"image": store}))
    assert "image, row 20:" in said and f"cannot be stored as {store}" in said
    assert list(files(tmp_path / "s")) == ["shard-00000.safetensors"]


def test_a_way_of_storing_for_each_key(tmp_path):
    s = make(tmp_path / "s", store={"image": "uint8"})
    assert s.index.fields["image"].dtype == "uint8" and s.fetch([0])["image"].dtype == torch.float32
    assert (s.fetch(range(N))["image"] - rows_of(range(N))["image"]).abs().max() <= 0.5 / 255 + 1e-7
    assert "store: 'imgae' is not one of" in line(lambda: make(tmp_path / "t", store={"imgae": "uint8"}))
    assert "store" in line(lambda: make(tmp_path / "t", store="fp8"))


@pytest.mark.parametrize("wrong", [dict(n=0), dict(n=-5), dict(shard_size=0), dict(n=2.5), dict(n="6")])
def test_a_wrong_plan_is_one_line(tmp_path, wrong):
    assert f"build_shards: {next(iter(wrong))} is" in line(lambda: make(tmp_path / "s", **wrong))


@pytest.mark.parametrize(
    "teacher",
    [
        lambda rows: {"a": torch.zeros(len(rows) + 1)},
        lambda rows: {},
        lambda rows: torch.zeros(len(rows)),
        lambda rows: {"a": [0] * len(rows)},
        lambda rows: {"a": torch.zeros(len(rows), 2 + rows.start)},
        lambda rows: {"a": torch.zeros(len(rows)), **({"b": torch.zeros(len(rows))} if rows.start else {})},
    ],
)
def test_a_teacher_that_makes_other_things_is_an_error(tmp_path, teacher):
    with pytest.raises((ValueError, TypeError), match="make"): make(tmp_path / "s", teacher)


# Interruption

BUILD = TEACHER + """
def slow(rows):
    print(rows.start, flush=True)
    sys.stdin.readline()
    return rows_of(rows)
build_shards(Path(sys.argv[1]), slow, n=50, shard_size=16, progress=False)
print("done", flush=True)
"""


@pytest.mark.parametrize("finished", [0, 1, 3])
def test_killed_while_building_it_goes_on_and_ends_the_same(tmp_path, start, whole, finished):
    p = start(BUILD, tmp_path / "s", before="")
    for i in range(finished):
        assert p.stdout.readline() == f"{i * SIZE}\n"
        print(file=p.stdin, flush=True)
    assert p.stdout.readline() == f"{finished * SIZE}\n"  # inside the teacher of the next shard
    p.send_signal(signal.SIGKILL)
    assert p.wait() == -signal.SIGKILL
    assert len(files(tmp_path / "s")) == finished
    said = line(lambda: Shards.open(tmp_path / "s"))
    assert "no shards there" in said if finished == 0 else f"unfinished, {finished} of 4" in said
    asked = Asked()
    s = make(tmp_path / "s", asked).verify()
    assert asked.ranges == [(0, 16), (16, 32), (32, 48), (48, 50)][finished:]
    assert files(s.dir) == files(whole.dir) and s.index == whole.index
    make(tmp_path / "s", asked)
    assert len(asked.ranges) == 4 - finished, "a finished folder asks its teacher nothing"


def test_a_shard_that_the_index_does_not_list_does_not_exist(tmp_path, whole):
    "A kill between the renaming of a shard and that of the index."
    s = make(tmp_path / "s")
    said = json.loads((s.dir / "index.json").read_text())
    del said["shards"]["shard-00003.safetensors"]
    (s.dir / "index.json").write_text(json.dumps(said))
    (s.dir / "shard-00003.safetensors").write_bytes(b"half")
    asked = Asked()
    assert files(make(s.dir, asked).dir) == files(whole.dir) and asked.ranges == [(48, 50)]


def test_two_builders_at_once_build_once(tmp_path, start, whole):
    first = start(BUILD, tmp_path / "s", before="")
    assert first.stdout.readline() == "0\n"
    second = start(BUILD, tmp_path / "s", before="")
    assert f"waiting for process {first.pid} on" in second.stdout.readline()
    for said in ["16\n", "32\n", "48\n", "done\n"]:
        print(file=first.stdin, flush=True)
        assert first.stdout.readline() == said
    out, err = second.communicate()
    assert second.returncode == 0 and out == "done\n", err
    assert files(tmp_path / "s") == files(whole.dir)


def test_a_builder_takes_over_from_a_killed_one(tmp_path, start, whole):
    first = start(BUILD, tmp_path / "s", before="")
    assert first.stdout.readline() == "0\n"
    print(file=first.stdin, flush=True)
    assert first.stdout.readline() == "16\n"
    second = start(BUILD, tmp_path / "s", before="")
    assert "waiting for process" in second.stdout.readline()
    first.kill()
    first.wait()
    second.stdin.write("\n" * 3)
    out, err = second.communicate()
    lines = out.splitlines()
    assert f"left behind by process {first.pid}" in lines[0] and lines[1:] == ["16", "32", "48", "done"], err
    assert files(tmp_path / "s") == files(whole.dir)


# Damage

@pytest.mark.parametrize("place", [0, 9, 200, -1])
def test_a_flipped_bit_is_found_and_the_file_named(tmp_path, place):
    s = make(tmp_path / "s")
    file = s.dir / "shard-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)
    said = line(Shards.open(s.dir).verify)
    assert str(file) in said and "shard-00000" not in said and "checksum" in said
    asked = Asked()
    assert str(file) in line(lambda: make(s.dir, asked)) and file.read_bytes() == data, "nothing is made anew over damage"
    file.unlink()
    assert make(s.dir, asked).verify().fetch([40])["label"].item() == 40 and asked.ranges == [(32, 48)]


def test_every_damaged_file_is_named(tmp_path):
    s = make(tmp_path / "s")
    for i in (0, 3):
        with open(s.dir / f"shard-0000{i}.safetensors", "r+b") as f: f.seek(-1, os.SEEK_END); f.write(b"\x7f")
    said = line(s.verify)
    assert "shard-00000" in said and "shard-00003" in said and "shard-00001" not in said


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_cut_file_is_named_on_opening(tmp_path, keep):
    s = make(tmp_path / "s")
    file = s.dir / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert str(file) in (said := line(lambda: Shards.open(s.dir))) and "bytes where index.json says" in said
    assert str(file) in line(lambda: s.fetch([20]))
    assert s.fetch([0])["label"].item() == 0, "the other files can be read"


def test_a_missing_file_is_named(tmp_path):
    s = make(tmp_path / "s")
    (s.dir / "shard-00001.safetensors").unlink()
    assert "shard-00001.safetensors: is missing" in line(lambda: Shards.open(s.dir)) and "is missing" in line(s.verify)
    assert "index.json is missing" in line(lambda: Shards.open(tmp_path / "none"))


def test_a_whole_file_of_another_build_is_noticed(tmp_path):
    s, t = (
        make(tmp_path / "s"),
        make(
            tmp_path / "t",
            lambda rows: {k: v for k, v in rows_of(rows).items() if k != "flag"} | {"flap": torch.zeros(len(rows), dtype=torch.bool)},
        ),
    )
    a, b = (x.dir / "shard-00000.safetensors" for x in (s, t))
    assert a.stat().st_size == b.stat().st_size
    a.write_bytes(b.read_bytes())
    assert "does not hold what index.json says" in line(lambda: Shards.open(s.dir).fetch([0]))
    assert "checksum" in line(s.verify)


def test_an_index_cut_anywhere_is_noticed(tmp_path):
    s = make(tmp_path / "s")
    text = (s.dir / "index.json").read_bytes()
    for n in range(0, len(text) - 2, 37):
        (s.dir / "index.json").write_bytes(text[:n])
        assert "index.json: damaged" in line(lambda: Shards.open(s.dir)) and "index.json: damaged" in line(lambda: make(s.dir))


@pytest.mark.parametrize(
    "change",
    [
        {"n": 10**9, "shard_size": 1},
        {"n": -1},
        {"n": "50"},
        {"n": 10**30},
        {"shard_size": 10**6},
        {"fields": {}},
        {"more": 1},
        {"meta": {"\ud800": 1}},
        {"a" * 5000: 1},
        {"shards": {"../../evil.safetensors": {"bytes": 1, "sha256": "0" * 64}}},
        {"fields": {"image": {"shape": [3], "dtype": "object", "store": "keep"}}},
        {"shards": {"shard-00000.safetensors": {"bytes": -1, "sha256": "0" * 64}}},
    ],
)
def test_a_hostile_index_is_refused(tmp_path, change):
    s = make(tmp_path / "s")
    (s.dir / "index.json").write_text(json.dumps(json.loads((s.dir / "index.json").read_text()) | change))
    assert str(s.dir) in line(lambda: Shards.open(s.dir).fetch([0]))


def test_an_index_cannot_name_a_file_elsewhere(tmp_path):
    s = make(tmp_path / "s")
    os.replace(s.dir / "shard-00003.safetensors", tmp_path / "elsewhere")
    text = (s.dir / "index.json").read_text().replace("shard-00003.safetensors", "../elsewhere")
    (s.dir / "index.json").write_text(text)
    assert "index.json: damaged, its shards are not those of 50 rows" in line(lambda: Shards.open(s.dir))


def test_other_data_in_the_same_folder_is_refused(tmp_path):
    make(tmp_path / "s", meta={"side": 4, "split": [0.5, 0.5]})
    asked = Asked()
    make(tmp_path / "s", asked, meta={"side": 4, "split": (0.5, 0.5)})
    for other, name in [
        (dict(n=51), "n is 50 there and 51 here"),
        (dict(shard_size=8), "shard_size is 16"),
        (dict(store="fp32"), "store is fp16"),
        (dict(meta={"side": 5}), "meta is"),
    ]:
        assert name in line(lambda o=other: make(tmp_path / "s", asked, **({"meta": {"side": 4, "split": [0.5, 0.5]}} | o)))
    assert asked.ranges == []


# The disk

def big(rows): return {"x": torch.full((len(rows), 25_000), 0.5)}  # 50 kB a row in half precision


def test_a_disk_that_is_too_small_is_told_at_the_first_shard(small_disk):
    asked = []
    def teacher(rows):
        asked.append(rows)
        return big(rows)
    said = line(lambda: build_shards(small_disk / "s", teacher, n=100, shard_size=2, progress=False))
    assert "the disk is too small" in said and len(asked) == 1 and not files(small_disk / "s")


def test_a_disk_that_fills_up_keeps_what_is_finished(small_disk):
    def teacher(rows):
        if rows.start == 4: (small_disk / "other").write_bytes(b"x" * 650_000)
        return big(rows)
    said = line(lambda: build_shards(small_disk / "s", teacher, n=8, shard_size=2, progress=False))
    assert str(small_disk / "s") in said and "disk" in said
    kept = files(small_disk / "s")
    assert list(kept) == ["shard-00000.safetensors", "shard-00001.safetensors"] and not list((small_disk / "s").glob(".*tmp*"))
    (small_disk / "other").unlink()
    s = build_shards(small_disk / "s", big, n=8, shard_size=2, progress=False).verify()
    assert {k: files(s.dir)[k] for k in kept} == kept and len(s) == 8


def test_a_limit_on_file_size_is_one_line(tmp_path, start):
    code = TEACHER + """
import resource
from kilobench.core.recipe import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try: build_shards(sys.argv[1], rows_of, n=50, shard_size=16, progress=False)
except UserError as e: print(e)
"""
    out, err = start(code, tmp_path / "s", before="").communicate()
    assert out.count("\n") == 1 and "shard-00000.safetensors: disk full" in out, err
    assert not files(tmp_path / "s")


def test_headless_progress_is_a_few_plain_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KILOBENCH_HEADLESS", "1")
    make(tmp_path / "images-1", n=100, shard_size=1, progress=True)
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"images-1: {i}/100 shards" for i in range(10, 101, 10)] and said.err == ""


def test_index_arithmetic():
    for n, size in [(1, 1), (16, 16), (17, 16), (2500, 1024)]:
        index = ShardIndex(n=n, shard_size=size)
        assert [i for s in range(len(index.names())) for i in index.rows(s)] == list(range(n)) and not index.complete


def test_a_damaged_folder_is_told_in_a_process_of_its_own(tmp_path, start):
    "What a user sees who lets the error through: its last line is the whole story."
    make(tmp_path / "s")
    os.truncate(tmp_path / "s/shard-00001.safetensors", 10)
    p = start(TEACHER + "Shards.open(sys.argv[1])", tmp_path / "s", before="")
    last = p.communicate()[1].splitlines()[-1]
    assert p.returncode == 1 and last.startswith("kilobench.core.recipe.UserError: ") and "shard-00001.safetensors" in last
