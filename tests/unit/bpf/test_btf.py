"""The dtypes and names that Python reads from BTF are those of bpf/types.h."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from lockgate.bpf.btf import BtfError, Schema
from tests.compilers import clang

TYPES = Path(__file__).parents[3] / "bpf" / "types.h"


def compile_c(target: Path, source: str) -> subprocess.CompletedProcess[str]:
    file = target.with_suffix(".c")
    file.write_text(source)
    include = f"-I/usr/include/{os.uname().machine}-linux-gnu"
    return subprocess.run(
        [clang(), "-O2", "-g", "-target", "bpf", include, "-c", str(file), "-o", str(target)],
        capture_output=True,
        text=True,
    )


def names(kind: str) -> list[str]:
    return re.findall(rf"^{kind} (\w+) \{{", TYPES.read_text(), re.M)


HEAD = f'#include <stddef.h>\n#include <linux/types.h>\n#include "{TYPES}"\n'
USES = "".join(f"{kind} {n} use_{kind}_{n};\n" for kind in ("struct", "enum") for n in names(kind))


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Schema:
    target = tmp_path_factory.mktemp("btf") / "types.o"
    done = compile_c(target, HEAD + USES + "const volatile __u16 odd = 3;\nint plain = 4;\n")
    assert done.returncode == 0, done.stderr
    return Schema.from_object(target)


def test_sizes_and_offsets_are_the_compilers(schema: Schema, tmp_path: Path) -> None:
    claims = []
    for name in names("struct"):
        dtype = schema.dtype(name)
        claims.append(f'_Static_assert(sizeof(struct {name}) == {dtype.itemsize}, "{name}");')
        for field, (_, offset, *_rest) in (dtype.fields or {}).items():
            claims.append(
                f'_Static_assert(offsetof(struct {name}, {field}) == {offset}, "{name}.{field}");'
            )
    assert len(claims) > 100
    done = compile_c(tmp_path / "claims.o", HEAD + "\n".join(claims))
    assert done.returncode == 0, done.stderr


def test_byte_order_arrays_and_nesting(schema: Schema) -> None:
    assert schema.dtype("addr") == np.dtype(("u1", 16))
    event = schema.dtype("event")
    assert event["sport"] == np.dtype(">u2") and event["time"] == np.dtype("<u8")
    assert event["saddr"] == np.dtype(("u1", 16))
    records = np.zeros(3, schema.dtype("endpoint"))
    records["view"]["rows"][1, 1] = 9
    last = records[1].tobytes()[-schema.dtype("endpoint_view").itemsize :]
    assert records["view"].shape == (3, 2) and last[:4] == b"\x09\0\0\0"
    assert schema.dtype("nat")["to"] == schema.dtype("tuple")


def test_enumerators_in_order(schema: Schema) -> None:
    cause = schema.enum("cause")
    assert list(cause)[:3] == ["CAUSE_NONE", "CAUSE_POLICY", "CAUSE_MALFORMED"]
    assert cause["CAUSE_MAX"] == max(cause.values())
    assert set(schema.enums) >= set(names("enum"))


def test_variables_know_their_section(schema: Schema) -> None:
    odd = schema.variable("odd")
    assert (odd.section, odd.size, odd.dtype) == (".rodata", 2, np.dtype("<u2"))
    assert schema.variables(".rodata") == ["odd"]
    assert schema.variable("plain").section == ".data"


def test_what_is_missing_is_named(schema: Schema, tmp_path: Path) -> None:
    with pytest.raises(BtfError, match="no struct unicorn in the BTF"):
        schema.dtype("unicorn")
    with pytest.raises(BtfError, match="no enum unicorn"):
        schema.enum("unicorn")
    junk = tmp_path / "junk"
    junk.write_bytes(b"no ELF")
    with pytest.raises(BtfError, match="not a 64-bit little-endian ELF"):
        Schema.from_object(junk)
