"""Which file systems are on another machine."""

from __future__ import annotations

from pathlib import Path

# As /proc/self/mountinfo names them. FUSE says which program is behind it only for some.
REMOTE = frozenset(
    "nfs nfs4 cifs smb3 smbfs ncpfs afs 9p ceph lustre glusterfs beegfs gpfs orangefs pvfs2 ocfs2 gfs2 virtiofs".split()
)
REMOTE_FUSE = (
    "sshfs",
    "s3fs",
    "goofys",
    "gcsfuse",
    "rclone",
    "glusterfs",
    "ceph",
    "blobfuse",
    "mount-s3",
    "juicefs",
    "alluxio",
)
MOUNTS = Path("/proc/self/mountinfo")


def is_remote(folder: Path) -> bool:
    """Whether a folder, which need not exist, is on a network mount. False where the system doesn't tell."""
    try:
        text = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
        path = folder.resolve()
    except (OSError, RuntimeError):
        return False
    return kind_is_remote(kind_of(path, text))


def kind_of(path: Path, mounts: str) -> str:
    """The file system's kind at an absolute path, by the text of a mountinfo file: the deepest mount, the last if several."""
    kind, depth = "", -1
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        words = left.split(" ")
        if len(words) < 5 or not right:
            continue
        point = Path(_unescaped(words[4]))
        if (path == point or point in path.parents) and len(point.parts) >= depth:
            kind, depth = right.split(" ")[0], len(point.parts)
    return kind


def kind_is_remote(kind: str) -> bool:
    """Whether a file system of this kind is on another machine."""
    return kind in REMOTE or (kind.startswith("fuse.") and kind.removeprefix("fuse.").startswith(REMOTE_FUSE))


def _unescaped(word: str) -> str:
    """A mount point as it is: blanks and the like are written as octal numbers."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        word = word.replace(code, character)
    return word
