"""The models a server has loaded: which one a request gets, and how they are exchanged.

A model that is replaced goes on serving the requests that began with it; its graphs are let go when
the last of them has ended.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from service.bundle import CONFIG_NAME
from service.domain import bundled_domains
from service.engine import Provider
from service.errors import RequestError, ServerError, VoxgateError
from service.recogniser import DecoderName, Recogniser, load_recogniser
from service.scheduler import BatchSettings, Observe, Priority, Scheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Model:
    """One loaded bundle."""

    folder: Path
    digest: str
    """Of the `config.json` of the bundle and of its domains, which have all other files' hashes."""
    live: Recogniser
    """Its work goes before that of `offline`."""
    offline: Recogniser
    scheduler: Scheduler

    @property
    def name(self) -> str:
        """By which requests choose it."""
        return self.live.name

    @property
    def language(self) -> str:
        """BCP-47 tag."""
        return self.live.language


Load = Callable[[Path], Model]


def load_model(
    folder: Path,
    *,
    provider: Provider,
    decoders: Sequence[DecoderName] | None,
    batches: BatchSettings,
    domains: Sequence[Path] = (),
    observe: Observe = lambda *_: None,
) -> Model:
    """Load a bundle behind a scheduler of its own.

    Args:
        folder: the bundle.
        provider: where the acoustic model runs.
        decoders: which decoders are made; see `load_recogniser`.
        batches: how much is run at once.
        domains: folders of domains beside those of the bundle.
        observe: told of each batch.

    Raises:
        BundleError: the bundle cannot be used.
        ProviderError: the provider is not there.
    """
    digest = _digest(folder)
    recogniser = load_recogniser(
        folder,
        provider=provider,
        decoders=decoders,
        domains=(*bundled_domains(folder), *domains),
    )
    scheduler = Scheduler(recogniser.engine, recogniser.streaming_engine, batches, observe=observe)
    n_at_once = batches.n_lanes * batches.most_utterances  # one recording may use every lane
    live, offline = (
        _take_turns(replace(recogniser, utterances_at_once=n_at_once), scheduler, priority)
        for priority in ("live", "offline")
    )
    return Model(folder, digest, live, offline, scheduler)


def _take_turns(recogniser: Recogniser, scheduler: Scheduler, priority: Priority) -> Recogniser:
    """A recogniser, and those of its domains, whose heavy work the scheduler runs."""
    return replace(
        recogniser,
        engine=scheduler.engine(priority),
        streaming_engine=scheduler.streaming_engine(priority),
        decoders={
            name: scheduler.decoder(decoder, priority)
            for name, decoder in recogniser.decoders.items()
        },
        domains={
            name: _take_turns(in_domain, scheduler, priority)
            for name, in_domain in recogniser.domains.items()
        },
    )


class Models:
    """All models of a server; safe to use from several threads."""

    def __init__(self, load: Load, folders: Sequence[Path], *, watched: Path | None = None) -> None:
        """Load the models.

        Args:
            load: loads one.
            folders: bundles; the first one serves requests that name nothing.
            watched: a folder whose subfolders are bundles, too, by name behind the others.

        Raises:
            VoxgateError: a bundle cannot be loaded, two have one name, or there is none.
        """
        self._load = load
        self._folders = tuple(folders)
        self._watched = watched
        self._lock = threading.Lock()
        self._reloading = threading.Lock()
        self._n_users: Counter[Model] = Counter()
        self._models: tuple[Model, ...] = ()
        models = []
        for folder in self._wanted():
            models.append(load(folder))
            _refuse_twins(models)
        if not models:
            raise ServerError(f"{watched} holds no bundle; expected folders with a {CONFIG_NAME}")
        self._models = tuple(models)
        self._seen = self._look()

    @property
    def loaded(self) -> tuple[Model, ...]:
        """The models that new requests can have."""
        return self._models

    def choose(self, name: str, language: str) -> Model:
        """The model of that name, or the first one of that language.

        Raises:
            RequestError: there is none; the message lists those there are.
        """
        models = self._models
        if name:
            named = [model for model in models if model.name == name]
            if not named:
                raise RequestError(
                    f"there is no model {name!r}; this server has "
                    f"{', '.join(repr(model.name) for model in models)}"
                )
            models = tuple(named)
        for model in models:
            if not language or _primary(language) == _primary(model.language):
                return model
        served = ", ".join(sorted({model.language for model in models}))
        raise RequestError(
            f"language_code {language!r} is not served"
            f"{f' by the model {name!r}' if name else ''}; expected {served}"
        )

    @contextmanager
    def use(self, name: str = "", language: str = "") -> Iterator[Model]:
        """Hold a model while a request needs it; see `choose`."""
        with self._lock:
            model = self.choose(name, language)
            self._n_users[model] += 1
        try:
            yield model
        finally:
            with self._lock:
                self._n_users[model] -= 1
            self._close_unused([model])

    def reload(self) -> list[str]:
        """Load what is new or has changed, let go of what is gone; lines that say what was done.

        A bundle that cannot be loaded changes nothing: the old one stays.
        """
        with self._reloading:
            self._seen = self._look()
            old = {model.folder: model for model in self._models}
            models: list[Model] = []
            said = []
            wanted = self._wanted()
            for number, folder in enumerate(wanted, start=1):
                present = old.get(folder)
                try:
                    if present is not None and present.digest == _digest(folder):
                        models.append(present)
                        continue
                    model = self._load(folder)
                    later = [old[other] for other in wanted[number:] if other in old]
                    try:
                        _refuse_twins([*models, *later, model])
                    except ServerError:
                        model.scheduler.close()
                        raise
                    models.append(model)
                    said.append(f"loaded {model.name} from {folder}")
                except VoxgateError as error:
                    said.append(f"kept the old {folder.name}: {error}" if present else str(error))
                    models += [present] if present else []
            retired = [model for model in old.values() if model not in models]
            said += [f"let go of {m.name} from {m.folder}" for m in retired]
            if not models:
                return [*said, "nothing is left to serve, so nothing was changed"]
            with self._lock:
                self._models = tuple(models)
            self._close_unused(retired)
            return said

    def has_changed(self) -> bool:
        """Whether any file of a bundle is other than when `reload` last looked."""
        return self._look() != self._seen

    def close(self) -> None:
        """Let go of every model, when its requests have ended."""
        retired = self._models
        with self._lock:
            self._models = ()
        self._close_unused(retired)

    def _look(self) -> dict[Path, tuple[int, int, int]]:
        """Files, bytes, and time of the last change of each bundle."""
        found = {}
        for folder in self._wanted():
            with contextlib.suppress(OSError):  # it is being copied, or removed
                stats = [path.stat() for path in folder.rglob("*")]
                sizes, times = [s.st_size for s in stats], [s.st_mtime_ns for s in stats]
                found[folder] = (len(stats), sum(sizes), max(times, default=0))
        return found

    def _wanted(self) -> list[Path]:
        if self._watched is None:
            return list(self._folders)
        found = sorted(path.parent for path in self._watched.glob(f"*/{CONFIG_NAME}"))
        return [*self._folders, *(folder for folder in found if folder not in self._folders)]

    def _close_unused(self, models: Sequence[Model]) -> None:
        for model in models:
            with self._lock:
                if model in self._models or self._n_users[model] > 0:
                    continue
                del self._n_users[model]
            model.scheduler.close()


def _refuse_twins(models: Sequence[Model]) -> None:
    for model in models[:-1]:
        if model.name == models[-1].name:
            raise ServerError(
                f"{model.folder} and {models[-1].folder} are both named {model.name!r}; "
                "export one of them with another --name"
            )


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    try:
        for part in (folder, *bundled_domains(folder)):
            digest.update((part / CONFIG_NAME).read_bytes())
    except OSError:  # loading it says what is wrong
        return ""
    return digest.hexdigest()


def _primary(language: str) -> str:
    return language.replace("_", "-").split("-")[0].lower()
