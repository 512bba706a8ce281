"""The memory that there is: what control groups leave, by the files of either version."""

from pathlib import Path

import pytest

from streamprune.process import peak_memory_bytes
from streamprune.runtime import room

MANY = 2**63 // 4096 * 4096 - 4096  # how version 1 says that there is no limit


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": 500, "a/b/memory.current": 200}, [340]),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": 500, "a/memory.current": 600}, [0]),
        ("0::/\n", {}, []),
        ("5:cpu:/a\n4:memory:/a\n", {f"memory/a/memory.{name}_in_bytes": 900 for name in ("limit", "usage")}, [40]),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": MANY, "memory/memory.usage_in_bytes": 100}, [MANY - 60]),
    ],
)  # fmt: skip
def test_what_control_groups_leave(
    membership: str, files: dict[str, object], expected: list[int], tmp_path: Path
) -> None:
    """The page cache, 40 bytes here, could be dropped; where more is used than the limit allows, nothing is left."""
    for name, value in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
        (path.parent / "memory.stat").write_text("anon 60\nactive_file 30\ninactive_file 10\n")
    (tmp_path / "membership").write_text(membership)
    assert list(room._free_in_groups(tmp_path, tmp_path / "membership")) == expected


def test_the_default_is_nine_tenths_of_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "held_bytes", lambda: 1000)
    monkeypatch.setattr(room, "_free_on_host", lambda: 5000)
    for groups, limit in (([], 5500), ([7000, 2000], 2800)):
        monkeypatch.setattr(room, "_free_in_groups", lambda groups=groups: groups)
        assert room.default_limit(on_gpu=False) == limit


def test_this_machine() -> None:
    assert 50_000_000 < room.held_bytes() <= peak_memory_bytes()
    assert room._free_on_host() > 10_000_000
