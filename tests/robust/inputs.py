"""Hostile inputs by kind of file: a valid file, and what a seeded random source makes of it. Nothing here knows a reader."""
import csv
import io
import json
import pickle
import random
import struct
import zipfile
import zlib
from typing import Any, Callable

from hypothesis import strategies as st

SECRET, MARK = "SECRET", "MARK"      # put into inputs as words; the child process replaces them by real paths
HUGE = (0, 1, -1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53, 2**62, 2**63 - 1, 2**64, 10**30, 10**400)
WORDS = ("", " ", "\0", "a" * 3000, "../SECRET/x", "../../SECRET/x.png", "SECRET/x.png", "/etc/passwd", "..", ".", "/", "~", "C:\\x", "x\ny", "\u202e\u0000é", "\ud800", "nan", "-0",
         "__import__('os').system('touch MARK')", "!!python/object/apply:os.system ['touch MARK']", "{{ 7*7 }}", "<script>alert(1)</script>", "%s%n", "1e999", "null", "٣", "\x1b[2J")
PLAIN = (None, True, False, [], {}, [[]], {"": {}}, float("nan"), float("inf"), -float("inf"), 1e308, 5e-324, 0.5, -0.0, [None], [[1, 2], [3]], "x")


class Trap:
    """A pickle that would run a command when it is opened carelessly."""
    def __init__(self, call: Callable, *args: Any): self.call, self.args = call, args
    def __reduce__(self) -> tuple: return self.call, self.args


# ---- any bytes

def bend(data: bytes, r: random.Random) -> bytes:
    """Cut, flip, overwrite with lengths, drop, double, blank: one to three times."""
    for _ in range(r.randint(1, 3)):
        n = len(data)
        at, size = (r.randrange(n) if r.random() < 0.6 else min(n - 1, int(r.expovariate(1 / 60)))) if n else 0, min(n, 1 << r.randrange(12))
        how = r.randrange(10)
        if how == 0: data = data[:at]
        elif how <= 3 and n: data = data[:at] + bytes([data[at] ^ 1 << r.randrange(8)]) + data[at + 1:]
        elif how == 4: data = data[:at] + struct.pack(r.choice("<>") + "Q", r.choice(HUGE) % 2**64) + data[at + 8:]
        elif how == 5: data = data[:at] + struct.pack(r.choice("<>") + "I", r.choice(HUGE) % 2**32) + data[at + 4:]
        elif how == 6: data = data[:at] + data[at + size:]
        elif how == 7: data = data[:at] + data[at:at + size] * r.randint(2, 5) + data[at + size:]
        elif how == 8: data = data[:at] + r.choice((b"\0", b"\xff", b" ", b"\n")) * size + data[at + size:]
        else: data = data[:at] + r.randbytes(r.randint(1, 64)) + data[at:]
    return data


# ---- values

def value(r: random.Random) -> Any:
    """Something that does not belong there."""
    how = r.randrange(7)
    if how == 0: return r.choice(HUGE) * r.choice((1, -1))
    if how <= 2: return r.choice(WORDS)
    if how == 3: return nested(r.choice((3, 30, 300)), r)
    if how == 4: return {r.choice(WORDS): value(r) for _ in range(r.randint(0, 3))} if r.random() < 0.5 else [value(r) for _ in range(r.randint(0, 4))]
    return r.choice(PLAIN)


def nested(depth: int, r: random.Random) -> Any:
    out: Any = r.choice((0, "x", None))
    for _ in range(depth): out = [out] if r.random() < 0.5 else {"a": out}
    return out


def places(x: Any, at: tuple = ()) -> list[tuple]:
    out = [at]
    for k, v in (x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ()): out += places(v, (*at, k))
    return out


def other(x: Any, r: random.Random) -> Any:
    """Plain values with one to three places changed, removed, renamed, doubled or exchanged."""
    x = json.loads(json.dumps(x))
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        path = r.choice(places(x))
        if not path: x = value(r) if r.random() < 0.3 else x; continue
        inner = x
        for k in path[:-1]: inner = inner[k]
        how, k = r.randrange(9), path[-1]
        if how <= 4: inner[k] = near(inner[k], r) if r.random() < 0.4 else value(r)
        elif how == 5: del inner[k]
        elif how == 6 and isinstance(inner, dict): inner[r.choice((*WORDS, str(k) + "s", str(k)[:-1]))] = inner.pop(k)
        elif how == 7 and isinstance(inner, list): inner.extend([inner[k]] * r.choice((1, 2, 50)))
        else:
            b = r.choice(places(x))
            if b and b[:len(path)] != path and path[:len(b)] != b:
                y = x
                for j in b[:-1]: y = y[j]
                inner[k], y[b[-1]] = y[b[-1]], inner[k]
    return x


def near(v: Any, r: random.Random) -> Any:
    """A value of the same type that is off."""
    if isinstance(v, bool): return int(v)
    if isinstance(v, int): return r.choice((v + 1, v - 1, -v, v * 1000, float(v), str(v), 0))
    if isinstance(v, float): return r.choice((-v, v * 1e30, v + 1e-9, int(v) if abs(v) < 1e18 else 0, str(v)))
    if isinstance(v, str): return r.choice((v.upper(), v + " ", "../" + v, v + "/../..", v[::-1], v[:1], [v], v + "\0", "/" + v))
    if isinstance(v, list): return r.choice((v[:-1], v + v, v[::-1], dict(enumerate(v)), tuple(v)[:1] and v[0], [v]))
    if isinstance(v, dict): return r.choice((list(v.items()), list(v), {k: v for k in v}, {}, str(v)))
    return 0


def text(x: Any) -> bytes: return json.dumps(x, ensure_ascii=True).encode()


def json_of(data: bytes, r: random.Random) -> bytes:
    how = r.randrange(12)
    if how == 0: return bend(data, r)
    if how == 1:
        n = r.choice((100, 1000, 5000, 100_000))
        return r.choice((b"[" * n, b"[" * n + b"]" * n, b'{"a":' * n + b"1" + b"}" * n, b"9" * n, b'"' + b"a" * n + b'"', b"{" + b'"a":1,' * n + b'"a":2}', b"[" + b"0," * n + b"0]"))
    if how == 2: return r.choice((b"\xef\xbb\xbf" + data, data.decode().encode("utf-16"), data + data, data + b"\0", b"\0" + data, b"NaN", b"null", b"0", b'""', b"[]", b"{}", b"", b"-", b'{"a":1e99999}'))
    if how == 3 and b": " in data:          # a key twice
        key = r.choice(data.split(b'"')[1::2])
        return data.replace(b"{", b'{"' + key + b'": ' + text(value(r)) + b", ", 1) if r.random() < 0.5 else data.rstrip()[:-1] + b', "' + key + b'": ' + text(value(r)) + b"}"
    return text(other(json.loads(data), r))


def yaml_of(data: bytes, r: random.Random) -> bytes:
    import yaml
    how, lines = r.randrange(8), data.decode().splitlines()
    if how == 0: return bend(data, r)
    if how == 1: return r.choice((b"a: &x 1\nb: *x\n", b"? [1, 2]\n: 3\n", b"- 1\n", b"%YAML 9.9\n---\na: 1", b"---\na: 1\n---\nb: 2\n", b"\t", b"a: |\n" + b" x\n" * 999, b"[" * 3000, b"{a: " * 3000, b"!!binary x", b"<<: {a: 1}"))
    if how <= 3:
        i = r.randrange(len(lines))
        key = lines[i].split(":")[0]
        lines[i] = f"{key}: " + r.choice(("!!python/object/apply:os.system ['touch MARK']", "!!python/name:os.system", "!!python/object/new:type {}", "!!python/module:os", "&a [*a]", "*b", "!!set {a}", "0x1F", "1_000", "1:30",
                                          "2001-01-01", "yes", "!!float x", "!!int 1", "!!timestamp 2001-01-01", "~", ".nan", ".inf", "-.inf", "9" * 5000, "1e999", "[", "{", "'", '"', "@", "`", "%", "|", ">", "[[[[]]]]", "a: b", "!<x> 1", "../SECRET/x"))
    elif how == 4: lines.insert(r.randrange(len(lines)), r.choice(lines))
    elif how == 5: del lines[r.randrange(len(lines))]
    elif how == 6: return yaml.safe_dump(other(json.loads(json.dumps(yaml.safe_load(data))), r), allow_unicode=r.random() < 0.5).encode(errors="replace")
    else:
        i = r.randrange(len(lines))
        lines[i] = " " * r.randint(1, 3) + lines[i]
    return "\n".join(lines).encode(errors="surrogatepass")


def lines_of(data: bytes, r: random.Random) -> bytes:
    """JSON lines."""
    if r.random() < 0.15: return bend(data, r)
    lines = data.splitlines()
    for _ in range(r.randint(1, 2)):
        i = r.randrange(len(lines))
        how = r.randrange(6)
        if how <= 2: lines[i] = json_of(lines[i], r)
        elif how == 3: lines[i] = lines[r.randrange(len(lines))]
        elif how == 4: lines = lines[:i] or [b""]
        else: lines.insert(i, r.choice((b"", b"\0", b"{}", b"[1]", b"null", b"# x", b"\xff\xfe")))
    return b"\n".join(lines)


def words_of(data: bytes, r: random.Random) -> bytes:
    """Lines of text."""
    if r.random() < 0.3: return bend(data, r)
    lines = data.splitlines() or [b""]
    i = r.randrange(len(lines))
    lines[i] = r.choice((lines[i] * 200, b"", b"\xff\xfe", b"\0", b"#" + lines[i], lines[i].upper(), b"\x1b[2J", "é\u202e".encode(), r.choice(WORDS).encode(errors="replace"), b" ".join(r.sample(lines[i].split(), len(lines[i].split())))))
    return r.choice((b"\n", b"\r\n", b"\r", b"\n\n")).join(lines)


def csv_of(data: bytes, r: random.Random) -> bytes:
    if r.random() < 0.3: return bend(data, r)
    rows = list(csv.reader(io.StringIO(data.decode())))
    row = r.choice(rows)
    k, how = r.randrange(len(row)), r.randrange(6)
    if how <= 2: row[k] = r.choice(("", "nan", "inf", "-1", "1e999", "x", '"', "9" * 400, "a,b", *map(str, HUGE), *(w for w in WORDS if w.isprintable())))
    elif how == 3: del row[k]
    elif how == 4: row.insert(k, "7")
    else: rows.insert(r.randrange(len(rows)), list(r.choice(rows)))
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue().encode(errors="replace")


# ---- PLY

def ply_of(data: bytes, r: random.Random) -> bytes:
    head, end, body = data.partition(b"end_header\n")
    lines, how = head.splitlines(), r.randrange(9)
    i = r.randrange(1, len(lines))
    if how == 0: return bend(data, r)
    if how == 1: return head + end + bend(body, r)
    if how == 2: lines = [line.rsplit(b" ", 1)[0] + b" " + str(r.choice(HUGE)).encode() if line.startswith(b"element") else line for line in lines]
    elif how == 3: lines[i] = r.choice((b"property list uchar int x", b"property list uint float y", b"property double x", b"property float x", b"property quad x", b"element face 3", b"element vertex 2", b"obj_info \xff", b"comment " + b"x" * 70000,
                                       b"format ascii 1.0", b"format binary_big_endian 1.0", b"format binary_little_endian 9.9", b"", b"element vertex -1", b"element vertex 1e3", b"element vertex 99999999999999999999", b"property"))
    elif how == 4: del lines[i]
    elif how == 5: lines.insert(i, r.choice(lines))
    elif how == 6: j = r.randrange(1, len(lines)); lines[i], lines[j] = lines[j], lines[i]
    elif how == 7:
        at = r.randrange(len(body) // 4) * 4
        body = body[:at] + struct.pack("<f", r.choice((float("nan"), float("inf"), 1e38, -1e38, 0.0, 1e-45))) + body[at + 4:]
    else: return head.replace(b"\n", r.choice((b"\r\n", b"\r", b" \n"))) + end + body
    return b"\n".join(lines) + b"\n" + r.choice((end, end, end, b"end_header\r\n", b"")) + body


# ---- npy

def npy_header(said: str, body: bytes, version: tuple[int, int] = (1, 0)) -> bytes:
    raw = said.encode("latin1", errors="replace") + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version[0] == 1 else "<I", len(raw) % (65536 if version[0] == 1 else 2**32)) + raw + body


def npy_of(data: bytes, r: random.Random) -> bytes:
    n = struct.unpack("<H", data[8:10])[0]
    said, body, how = data[10:10 + n].decode("latin1").strip(), data[10 + n:], r.randrange(6)
    if how == 0: return bend(data, r)
    if how == 1: return npy_header(said.replace("|u1", r.choice(("|O", "<f8", ">f4", "<c16", "<U9999999", "|V3", "<M8[ns]", "|S0", "[('a', 'O')]", "x", "", "|u1, (3,)", "<i4"))), body, r.choice(((1, 0), (2, 0), (3, 0), (9, 9))))
    if how == 2:
        shape = r.choice((f"({r.choice(HUGE)}, {r.choice(HUGE)})", f"({r.randint(1, 9)}, {r.randint(1, 99)}, {r.randint(-1, 99)})", "(-1,)", "()", "(3, 64)", "3", "(1.5,)", "('a',)", "(None,)", "(True,)", "(" * 2000 + ")" * 2000, "(2**62,)", "(10**100,)", "(3,64,64,1)", "(99999999999,)"))
        return npy_header(said[:said.index("(")] + shape + said[said.index(")") + 1:], body)
    if how == 3: return npy_header(r.choice(("__import__('os').system('touch MARK')", "{'descr': __import__('os').system('touch MARK'), 'fortran_order': False, 'shape': (1,)}", "{}", "[]", "{'descr': '|u1'}", "(" * 9000, "1 if 1 else 2", "\0",
                                             "{'descr': '|u1', 'fortran_order': 3, 'shape': (3, 64, 64), }", "{'descr': '|u1', 'fortran_order': False, 'shape': (3, 64, 64), 'x': 1}", "lambda: 0", "'" + "a" * 60000, said + said, "{" * 300 + "}" * 300)), body)
    if how == 4: return npy_header(said.replace("False", r.choice(("True", "None", "0", "[]"))), body, (1, 0))
    import numpy as np
    out = io.BytesIO()
    np.save(out, np.array([Trap(__import__("os").system, "touch MARK")], dtype=object), allow_pickle=True)
    return out.getvalue()


# ---- pictures

def chunk(kind: bytes, data: bytes) -> bytes: return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    out, at = [], 8
    while at + 12 <= len(png):
        n = struct.unpack(">I", png[at:at + 4])[0]
        out.append((png[at + 4:at + 8], png[at + 8:at + 8 + n]))
        at += 12 + n
    return out


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(touch MARK) pop\n%%EOF\n"
BOMB = zlib.compress(b"\0" * (64 << 20), 9)      # 64 kB that are 64 MiB


def other_formats() -> list[bytes]:
    """What else a library of pictures opens, whatever the name says."""
    from PIL import Image
    out = [EPS, EPS.replace(b"0 0 8 8", b"0 0 99999 99999"), b"GIF89a\xff\xff\xff\xff\0\0\0", b"BM" + b"\0" * 60, b"P6 99999 99999 255\n", b"P6 8 8 255\n" + bytes(192), b"P5 8 8 65535\n" + bytes(128), b"8BPS\0\1" + bytes(6) + b"\0\3" + struct.pack(">II", 30000, 30000) + b"\0\10\0\3",
           b"II*\0\xff\xff\xff\xff", b"\0\0\1\0\1\0" + b"\0" * 40, b"SIMPLE  =                    T" + b" " * 50, b"\xd7\xcd\xc6\x9a" + bytes(18), b"#define im_width 99999\n#define im_height 99999\n", b"DDS " + struct.pack("<I", 124) + b"\xff" * 120, b"%PDF-1.4\n", b"<svg/>", b"RIFF\xff\xff\xff\xffWEBPVP8 "]
    for form in ("GIF", "BMP", "TIFF", "WEBP", "JPEG", "ICO", "TGA", "PCX", "SGI", "PPM", "JPEG2000", "IM"):
        b = io.BytesIO()
        try: Image.new("RGB", (16, 16), (9, 99, 199)).save(b, form)
        except (OSError, KeyError): continue
        out.append(b.getvalue())
    return out


_formats: list[bytes] = []


def png_of(data: bytes, r: random.Random) -> bytes:
    how = r.randrange(10)
    if how <= 1: return bend(data, r)
    if how == 2:
        if not _formats: _formats.extend(other_formats())
        x = r.choice(_formats)
        return x if r.random() < 0.4 else bend(x, r)
    parts = chunks(data)
    i = r.randrange(len(parts))
    kind, body = parts[i]
    if how <= 5:
        w, h = (r.choice((1, 8, 4096, 65535, 2**20, 2**31 - 1, 0, 9000)) for _ in "wh")
        if r.random() < 0.9 and w * h > 2**22: w = 2**31 - 1     # rarely one that must be decoded whole
        parts[0] = (b"IHDR", struct.pack(">IIBBBBB", w, h, r.choice((1, 2, 4, 8, 16, 3)), r.choice((0, 2, 3, 4, 6, 1, 9)), r.choice((0, 0, 0, 1)), r.choice((0, 0, 0, 1)), r.choice((0, 1, 2))))
    elif how == 6: parts[i] = (kind, bend(body, r))
    elif how == 7: del parts[i]
    elif how == 8: parts.insert(i, r.choice((parts[r.randrange(len(parts))], (b"zTXt", b"x\0\0" + BOMB), (b"iCCP", b"x\0\0" + BOMB), (b"tEXt", b"kilobench normal\0SECRET"), (b"PLTE", b"\0" * 9), (b"tRNS", b"\0"), (b"acTL", b"\xff" * 8), (b"eXIf", b"\xff" * 40), (b"IDAT", BOMB), (b"gAMA", b"\0"))))
    else: parts[i] = (r.choice((b"IDAT", b"IEND", b"PLTE", b"zzzz", b"IHDR", b"fdAT")), body)
    return data[:8] + b"".join(chunk(k, b) for k, b in parts)


# ---- .pt and safetensors

def traps() -> list[bytes]:
    """Pickles that would run something, by themselves and inside torch's archives."""
    import builtins
    import os
    import torch
    calls = [Trap(os.system, "touch MARK"), Trap(builtins.eval, "open('MARK', 'w')"), Trap(builtins.exec, "open('MARK', 'w')"), Trap(open, "MARK", "w"), Trap(os.mkdir, "MARK"), Trap(__import__, "this"), Trap(torch.load, "SECRET/x")]
    out = [pickle.dumps(c, p) for c in calls for p in (0, 2, 5)]
    for c in calls:
        for more in ({}, {"_use_new_zipfile_serialization": False}):
            b = io.BytesIO()
            torch.save({"albedo": c, "names": ["a"]}, b, **more)
            out.append(b.getvalue())
    return out


_traps: list[bytes] = []


def pt_of(data: bytes, r: random.Random) -> bytes:
    import torch
    how = r.randrange(6)
    if not _traps: _traps.extend(traps())
    if how == 0: return bend(data, r)
    if how == 1: x = r.choice(_traps); return x if r.random() < 0.5 else bend(x, r)
    held = torch.load(io.BytesIO(data), weights_only=True)
    if how == 2:
        held = r.choice((held, list(held.values()), [held] * 3, {"x": held}, (held,), value(r), {**held, r.choice(list(held)): value(r)}, {k: v for k, v in held.items() if r.random() < 0.7}, {k: (v[:1] if isinstance(v, torch.Tensor) else v) for k, v in held.items()}))
    elif how == 3:
        k = r.choice([k for k, v in held.items() if isinstance(v, torch.Tensor)])
        v = held[k]
        held[k] = r.choice((v.int(), v.half(), v.double(), v * float("nan"), v[0], v[None], v.to_sparse(), v.new_zeros(0), v[..., :0], torch.zeros(1).expand(2**20, 3, 64, 64), v.transpose(0, 1), v.to(torch.complex64), v > 0, v.to(torch.bfloat16), torch.quantize_per_tensor(v, 0.1, 0, torch.quint8)))
    b = io.BytesIO()
    torch.save(held, b)
    if how <= 3: return b.getvalue()
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", r.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as new:
        for name in old.namelist():
            x = old.read(name)
            if name.endswith("data.pkl") and r.random() < 0.7: x = bend(x, r) if r.random() < 0.6 else r.choice(_traps)
            elif r.random() < 0.3: x = bend(x, r)
            if r.random() < 0.05: name = "../MARK"
            if r.random() > 0.05: new.writestr(name, x)
    return out.getvalue()


def safetensors_of(data: bytes, r: random.Random) -> bytes:
    n = struct.unpack("<Q", data[:8])[0]
    head, body, how = json.loads(data[8:8 + n]), data[8 + n:], r.randrange(8)
    if how == 0: return bend(data, r)
    if how == 1: return data[:8 + n] + bend(body, r)
    if how == 2: return struct.pack("<Q", r.choice(HUGE) % 2**64) + data[8:]
    names = [k for k in head if k != "__metadata__"]
    if how <= 5:
        k = r.choice(names)
        part = r.choice(("dtype", "shape", "data_offsets"))
        head[k][part] = {"dtype": r.choice(("F64", "I64", "F8_E4M3", "U8", "BOOL", "X", 3, None, "F32", "BF16", "C64")), "shape": r.choice(([], [0], [-1], [2**62], [2**31, 2**31, 2**31], [1.5], "x", None, [1] * 70, head[k]["shape"][::-1])),
                         "data_offsets": r.choice(([0, 0], [0, 2**63], [2**63, 2**64 - 1], [-1, 3], [8, 0], [0], [0, len(body)], "x", [1.5, 2]))}[part]
    elif how == 6:
        meta = head.get("__metadata__", {})
        meta[next(iter(meta), "x")] = r.choice((value(r), "{}", "[" * 3000, meta.get("kilobench", "")[:-7]))
    else: head = other(head, r)
    raw = text(head)
    return struct.pack("<Q", len(raw)) + raw + body


KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": json_of, "yaml": yaml_of, "jsonl": lines_of, "text": words_of, "csv": csv_of, "ply": ply_of, "npy": npy_of, "png": png_of, "pt": pt_of, "safetensors": safetensors_of, "bytes": bend}

_json = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8), lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4), max_leaves=12)


@st.composite
def inputs(draw: Callable, kind: str, valid: bytes) -> bytes:
    """A hostile file of a kind: mostly a valid one with something wrong, now and then bytes or JSON of hypothesis's own."""
    seed = draw(st.integers(2**16, 2**64 - 1))
    how = seed % 20
    if how == 0: return draw(st.binary(max_size=300))
    if how == 1 and kind in ("json", "jsonl", "yaml"): return json.dumps(draw(_json)).encode()
    return KINDS[kind](valid, random.Random(seed))
