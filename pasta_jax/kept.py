"""Compiled programs kept for the next start: in jax's persistent cache, and beside it.

jax finds a program in its cache only when it is traced and lowered, which for a decode loop takes longer than to
read it. So a decoder's programs are kept whole as well, each in a file that is named by a hash of all that it was
made from: a start that finds it only loads it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import logging
import os
import pickle
import platform
import secrets
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pasta_jax.files import replacing

if TYPE_CHECKING:
    import jax

LOG = logging.getLogger("pasta_jax")

CACHE_BYTES = 2 * 2**30
"""What this user's cache of compiled programs may hold when a command begins: 2 GiB."""

JAX, WHOLE, TIMES = "-cache", "-program", "-times"
"""How files end: entries of jax's cache, the programs that are kept whole, and times that were measured of them."""

ZSTD = b"\x28\xb5\x2f\xfd"
"""How its frames begin."""

CHECKED = "pasta_jax-checked"
"""An empty file in the folder: entries of jax's that are older were found in order."""

programs: str | None = None
"""The folder in which decoders keep programs whole; None is nowhere.

Only `keep_compiled` sets it. A process that does not ask for it may change functions of this package while it runs,
which no hash of its files tells.
"""


def keep_compiled(folder: str | None) -> None:
    """Has jax and decoders keep compiled programs in a folder and look there first, also what compiles in no time.

    Without a folder it is that of jax's own settings, or else this user's, which is kept below CACHE_BYTES; "" is
    none. One that cannot be written is not used.
    """
    import jax

    global programs
    own = folder is None and not jax.config.values["jax_compilation_cache_dir"]
    if own:
        folder = users_folder()
        if sys.platform == "darwin" and jax.__version_info__ < (0, 10):
            folder = ""  # reading large programs back may crash there
    if folder and is_local(folder):
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(f"{folder} is not writable")
            if own and hasattr(os, "getuid") and os.stat(folder).st_uid != os.getuid():
                raise PermissionError(f"{folder} belongs to another user")
            if own:
                trim(folder, CACHE_BYTES)
        except OSError as error:
            LOG.warning("Compiled programs are not kept for the next start: %s.", error)
            folder = ""
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", folder or None)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    used = jax.config.values["jax_compilation_cache_dir"]
    programs = used if used and is_local(used) else None
    if programs:
        remove_cut(programs)


def users_folder() -> str:
    """Where this user's compiled programs are kept by default; "" if the user has no home."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(home, "pasta_jax", "xla", processor()) if os.path.isabs(home) else ""  # ~ is nobody's


def is_local(folder: str) -> bool:
    """Whether it is a folder of this machine, not gs://bucket/folder."""
    return "://" not in folder


def processor() -> str:
    """A name for what this processor can execute: jax would run what was compiled for another one, and crash."""
    text = f"{platform.machine()} {platform.processor()}"
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        text += "".join(
            sorted({line for line in file if line.startswith(("flags", "Features", "model name"))})
        )
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def trim(folder: str, most: int) -> None:
    """Removes the programs that were not used for longest, down to `most` bytes; nothing else."""
    found = []
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):  # another process removed it
            if entry.name.endswith((JAX, WHOLE, TIMES)) and entry.is_file():
                stat = entry.stat()
                found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, entry.path))
    excess = sum(size for _, size, _ in found) - most
    for _, size, path in sorted(found):
        if excess <= 0:
            break
        with contextlib.suppress(OSError):
            os.remove(path)
        excess -= size


# ------------------------------------------------------------------------------------------ programs kept whole


def file_of(devices: Sequence[jax.Device], *made_from: object, ending: str = WHOLE) -> Path | None:
    """The file of a program, or None if it is not to be kept.

    Args:
      devices: those that it runs on, in order.
      made_from: what else it depends on besides this package, its environment and jax's settings; `repr` tells one
        from another.
      ending: of the file's name.
    """
    import jax

    sources = _sources()
    if programs is None or sources is None or jax.process_count() > 1:
        return None
    settings = {name: value for name, value in jax.config.values.items() if "cache" not in name}
    flags = {name: os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    machine = processor(), devices[0].client.platform_version, [(d.id, d.device_kind) for d in devices]
    text = repr((sources, settings, flags, machine, jax.sharding.get_abstract_mesh(), made_from))
    file = Path(programs, hashlib.sha256(text.encode()).hexdigest() + ending)
    with contextlib.suppress(OSError):
        if file.stat().st_size == 0:  # its backend cannot write or read it
            return None
    return file


@functools.cache
def _sources() -> str | None:
    """A hash of this package and of what its programs are made with; None if its files cannot be read."""
    package = Path(__file__).parent
    libraries = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax", "numpy")]
    found = hashlib.sha256("\n".join([sys.version, *libraries]).encode())
    files = sorted(package.rglob("*.py"))
    for file in files:
        found.update(f"{file.relative_to(package)} {file.stat().st_size}\n".encode() + file.read_bytes())
    return found.hexdigest() if files else None


def read(file: Path, devices: Sequence[jax.Device]) -> jax.stages.Compiled | None:
    """The program in a file, loaded for the devices; None without the file. One that is damaged is removed."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    digest, packed = data[:32], data[32:]
    if hashlib.sha256(packed).digest() != digest:
        with contextlib.suppress(OSError):
            file.unlink()
        return None
    try:
        from jax.experimental import serialize_executable

        program, in_tree, out_tree = pickle.loads(zlib.decompress(packed))
        return serialize_executable.deserialize_and_load(
            program, in_tree, out_tree, backend=devices[0].client, execution_devices=devices
        )
    except Exception:  # jax does not say what it may raise
        _give_up(file)
        return None


def keep(file: Path, program: jax.stages.Compiled) -> None:
    """Writes a program to its file, unless that is there, or its backend cannot.

    XLA for CPUs can only serialize programs that it compiled itself, not those that jax read from its cache.
    `unique_name` sees to that.
    """
    if file.exists():  # also one that `read` gave up
        return
    from jax.experimental import serialize_executable

    try:
        packed = zlib.compress(pickle.dumps(serialize_executable.serialize(program)), 1)
    except Exception:  # not every backend can
        _give_up(file)
        return
    with contextlib.suppress(OSError), replacing(file, "wb") as out:
        out.write(hashlib.sha256(packed).digest() + packed)


def _give_up(file: Path) -> None:
    """Leaves the program to jax's cache from now on: an empty file says so."""
    with contextlib.suppress(OSError), replacing(file, "wb"):
        pass


def unique_name(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function under a name that no other has: jax does not find it in its cache, and compiles it."""
    unique: Any = functools.partial(function)
    unique.__name__ = f"{name}_{secrets.token_hex(6)}"
    return unique


# ------------------------------------------------------------------------------------------- entries cut off


def remove_cut(folder: str) -> None:
    """Removes entries of jax's cache that a kill or a full disk cut off: jax would warn of them at each start.

    It writes in place, and never writes anew what is there. Only entries since the last check are read.
    """
    stamp = Path(folder, CHECKED)
    with contextlib.suppress(OSError):
        since = stamp.stat().st_mtime_ns if stamp.exists() else 0
        stamp.touch()
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):  # another process removed it
                is_new = entry.name.endswith(JAX) and entry.is_file() and entry.stat().st_mtime_ns >= since
                if is_new and not _is_complete(Path(entry.path).read_bytes()):
                    os.remove(entry.path)


def _is_complete(data: bytes) -> bool:
    """Whether compressed data goes to its end: zstd (RFC 8878), which jax prefers, or zlib."""
    if not data.startswith(ZSTD):
        stream = zlib.decompressobj()
        with contextlib.suppress(zlib.error):
            stream.decompress(data)
        return stream.eof
    try:
        about = data[4]
        whole_in_memory = about >> 5 & 1
        at = 6 - whole_in_memory + (0, 1, 2, 4)[about & 3] + (whole_in_memory, 2, 4, 8)[about >> 6]
        is_last = False
        while not is_last:
            block = data[at] | data[at + 1] << 8 | data[at + 2] << 16
            is_last, is_repeated = bool(block & 1), block >> 1 & 3 == 1
            at += 3 + (1 if is_repeated else block >> 3)
    except IndexError:
        return False
    return at + (about & 4) <= len(data)  # at the end there may be a checksum of four bytes
