"""Repositories on the Hugging Face hub, read through huggingface_hub with its cache and its offline switch."""

import logging
import shutil
import socket
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from tl_circuits.dictionaries.references import Reference
from tl_circuits.dictionaries.repository import Repository, inside
from tl_circuits.errors import DictionaryError, DownloadError

logger = logging.getLogger(__name__)


class HubRepository(Repository):
    """The files of one hub repository, or of one folder in it.

    Files in the cache are used without asking the network. ``cache_dir``: None for the hub library's own.
    """

    def __init__(self, reference: Reference, cache_dir: Path | None = None):
        self.name = str(reference)
        self._reference = reference
        self._cache_dir = cache_dir
        self._prefix = f"{reference.path}/" if reference.path else ""

    @cached_property
    def paths(self) -> Sequence[str]:
        """The names of all files in the folder; when offline, of those in the cache."""
        import huggingface_hub as hub

        snapshot = self._snapshot()
        if _offline():
            if snapshot is None:
                raise DownloadError(
                    f"{self.name} is not in the cache {self._cache()} and HF_HUB_OFFLINE is set. Download it where "
                    f"there is a network: hf download {self._reference.repo_id}"
                )
            names = _files_below(snapshot)
        else:
            try:
                with _clear_errors(self._reference, "list the files of"):
                    _require_network()
                    names = hub.HfApi().list_repo_files(self._reference.repo_id, revision=self._reference.revision)
            except DownloadError as error:
                if snapshot is None or _is_answer(error.__cause__):
                    raise
                logger.warning("%s Using what is in the cache.", error)
                names = _files_below(snapshot)
        below = (name.removeprefix(self._prefix) for name in names if name.startswith(self._prefix))
        return tuple(sorted(below))

    def fetch(self, paths: Iterable[str]) -> None:
        """Download what is not in the cache. If the disk has too little room, DownloadError is raised before."""
        missing = [path for path in paths if self._cached(path) is None]
        if not missing:
            return
        self._require_space(missing)
        for path in missing:
            self.local(path)

    def local(self, path: str) -> Path:
        """The file in the cache; downloaded if it is not there, going on with an interrupted download."""
        import huggingface_hub as hub

        cached = self._cached(path)
        if cached is not None:
            return cached
        with _clear_errors(self._reference, f"download {path} of"):
            return Path(
                hub.hf_hub_download(
                    self._reference.repo_id,
                    self._prefix + inside(path, self.name),
                    revision=self._reference.revision,
                    cache_dir=self._cache_dir,
                )
            )

    def _cached(self, path: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(
            self._reference.repo_id,
            self._prefix + inside(path, self.name),
            cache_dir=self._cache_dir,
            revision=self._reference.revision,
        )
        return Path(found) if isinstance(found, str) else None

    def _cache(self) -> Path:
        from huggingface_hub import constants

        return Path(self._cache_dir or constants.HF_HUB_CACHE)

    def _snapshot(self) -> Path | None:
        """The cache's folder for this revision, which may be incomplete; None if there is none."""
        folder = self._cache() / ("models--" + self._reference.repo_id.replace("/", "--"))
        revision = self._reference.revision or "main"
        ref = folder / "refs" / revision
        commit = ref.read_text().strip() if ref.is_file() else revision
        snapshot = folder / "snapshots" / commit
        return snapshot if snapshot.is_dir() else None

    def _require_space(self, paths: Sequence[str]) -> None:
        import huggingface_hub as hub

        if _offline():
            return  # the download itself says what is missing
        with _clear_errors(self._reference, "ask for the sizes of the files of"):
            infos = hub.HfApi().get_paths_info(
                self._reference.repo_id, [self._prefix + p for p in paths], revision=self._reference.revision
            )
        cache = self._cache()
        cache.mkdir(parents=True, exist_ok=True)
        require_space(
            cache, sum(info.size for info in infos if isinstance(info, hub.RepoFile)), f"download {self.name}"
        )


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise DownloadError if the disk of ``folder`` has less than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"not enough disk space to {purpose}: it needs {needed / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB "
            "free. Make room, or choose another place (HF_HUB_CACHE for downloads, TL_CIRCUITS_CACHE for converted "
            "files)."
        )


def _files_below(folder: Path) -> list[str]:
    return [PurePosixPath(p.relative_to(folder)).as_posix() for p in folder.rglob("*") if p.is_file()]


def _require_network() -> None:
    """Raise OSError at once if the hub does not answer; the hub library would try for most of a minute."""
    from huggingface_hub import constants

    if urllib.request.getproxies():
        return  # behind a proxy a direct connection proves nothing
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    socket.create_connection((address.hostname or "", port), timeout=5).close()


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _is_answer(error: BaseException | None) -> bool:
    """Whether the error is an answer of the hub, and not a missing network."""
    return getattr(error, "response", None) is not None


@contextmanager
def _clear_errors(reference: Reference, doing: str) -> Iterator[None]:
    """Turn the hub library's errors into DownloadErrors that say what to do."""
    from huggingface_hub import errors

    repo = reference.repo_id
    try:
        yield
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{repo} is gated: accept its terms at https://huggingface.co/{repo} and log in with: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DownloadError(f"{repo} has no revision {reference.revision!r}.") from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(
            f"there is no repository {repo} on the hub, or it is private. Look at https://huggingface.co/{repo}; for a "
            "private one log in with: hf auth login"
        ) from error
    except errors.EntryNotFoundError as error:
        where = (
            "is not in the cache and cannot be fetched" if isinstance(error, FileNotFoundError) else "does not exist"
        )
        state = " (HF_HUB_OFFLINE is set)" if _offline() else ""
        raise DownloadError(f"cannot {doing} {reference}: it {where}{state}. {_first_line(error)}") from error
    except _failures(errors.HfHubHTTPError) as error:
        state = "HF_HUB_OFFLINE is set" if _offline() else "is there a network?"
        raise DownloadError(f"cannot {doing} {reference} ({state}): {_first_line(error)}") from error
    except errors.HFValidationError as error:
        raise DictionaryError(f"{reference} is not a hub repository: {_first_line(error)}") from error


def _failures(kind: type[Exception]) -> tuple[type[Exception], ...]:
    """What a failed request raises: OSError, or the transport's own error, which depends on the hub library's version.

    The transport's error class is among the bases of the library's own, ``kind``.
    """
    return (OSError, *(base for base in kind.__bases__ if issubclass(base, Exception)))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
