"""The recogniser: features in, segments of text with times out.

Files and streams meet here. A recording of at most a minute is recognised whole; a longer one is
cut into utterances by the endpointing that streams have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice, product
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from service.bundle import (
    DEFAULT_PROFILE,
    Bundle,
    DecoderSettings,
    Profile,
    SearchTokens,
    Survival,
    load_bundle,
)
from service.decoding.beam import BeamDecoder, Lexicon, WordCalibration
from service.decoding.compiled import announce
from service.decoding.greedy import GreedyDecoder
from service.decoding.hypothesis import Decoder, Hypothesis, Phrase, Word
from service.decoding.ngram import NgramModel, load_ngram
from service.decoding.reference import ReferenceDecoder, load_kenlm
from service.domain import READINGS, Domain, load_domain
from service.endpointing import EndpointSettings
from service.engine import (
    AcousticEngine,
    OnnxEngine,
    OnnxStreamingEngine,
    Provider,
    StreamingEngine,
)
from service.errors import BundleError, RequestError
from service.features import FeatureSettings, FeatureStream
from service.first_pass import FirstPass
from service.g2p import Pronouncer
from service.rescorer import Rescorer
from service.rescoring import RescoringDecoder
from service.segmenter import Segmenter, Utterance, UtteranceEnded
from service.text import BLANK_TOKEN, SPACE

FloatArray = npt.NDArray[np.float32]
DecoderName = Literal["greedy", "beam", "beam-characters", "beam-phones", "rescored", "reference"]
"""`beam` searches the head that the bundle prefers, `rescored` has a recurrent language model rank
what it finds; `reference` is pyctcdecode with KenLM."""

LONGEST_WHOLE_S: Final = 60.0
"""A longer recording is cut into utterances."""
_UTTERANCES_ON_GPU: Final = 16
_PIECE_SAMPLES: Final = 160_000  # the front end works in float64: large blocks would cost memory
_WARM_UP_S: Final = 1.0
_SILENCE_LOG_ENERGY: Final = -12.0  # below the loudest band of white noise at -90 dBFS
_NEVER: Final = -100.0


@dataclass(frozen=True)
class TimedWord:
    """One recognised word; times count from the start of the recording."""

    text: str
    start_s: float
    end_s: float
    confidence: float
    """Between 0 and 1."""


@dataclass(frozen=True)
class Alternative:
    """One reading of a segment."""

    words: tuple[TimedWord, ...]
    score: float
    """Log score, comparable between the alternatives of one segment only."""
    confidence: float
    """Between 0 and 1; 0 without words."""

    @property
    def transcript(self) -> str:
        """The words, separated by single spaces."""
        return " ".join(word.text for word in self.words)


@dataclass(frozen=True)
class Intent:
    """What was asked for."""

    name: str
    """Empty where nothing was that the domain knows."""
    confidence: float
    """Between 0 and 1."""


@dataclass(frozen=True)
class Slot:
    """A value that goes with an intent; times count from the start of the recording."""

    name: str
    value: str
    """In the words of the domain."""
    raw: str
    """The words as recognised."""
    start_s: float
    end_s: float
    confidence: float
    """Between 0 and 1."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording and what was said in it."""

    alternatives: tuple[Alternative, ...]
    """Best first, at least one."""
    end_s: float
    """Where the stretch ends, seconds from the start of the recording."""
    intent: Intent | None = None
    """What was asked for; None without a domain."""
    slots: tuple[Slot, ...] = ()
    """What goes with the intent, in order."""


@dataclass
class Timings:
    """Seconds of work by stage; add to it as work is done."""

    features_s: float = 0.0
    segmentation_s: float = 0.0
    acoustic_model_s: float = 0.0
    decoding_s: float = 0.0

    @property
    def total_s(self) -> float:
        """Seconds of all stages."""
        return self.features_s + self.segmentation_s + self.acoustic_model_s + self.decoding_s


@dataclass(frozen=True)
class Recogniser:
    """A loaded model; safe to use from several threads."""

    name: str
    """Name by which requests choose the model."""
    language: str
    """BCP-47 tag."""
    features: FeatureSettings
    """The front end the model was trained with."""
    subsampling: int
    """Feature frames for each output frame."""
    tokens: tuple[str, ...]
    """Token list of the first head, blank first."""
    phones: tuple[str, ...]
    """Phone list of the second head, blank first; its log_probs follow those of the tokens."""
    engine: AcousticEngine
    """The model with full context."""
    streaming_engine: StreamingEngine
    """The model window by window."""
    profiles: Mapping[str, Profile]
    """How streams may be read."""
    survival: Mapping[str, Survival]
    """Calibration of interim results, by the kind of final result."""
    decoders: Mapping[DecoderName, Decoder]
    phone_decoders: frozenset[DecoderName]
    """The decoders that search the phones."""
    utterances_at_once: int = 1
    """Of a long recording, given to the engine together. A processor gains nothing from more, and
    then no utterance's text depends on another's."""
    domains: Mapping[str, Recogniser] = field(default_factory=dict)
    """The same model, listening for what belongs to a domain, by its name."""
    domain: Domain | None = None
    """What is listened for; None for anything."""
    timings: Timings = field(default_factory=Timings)

    @property
    def sample_rate(self) -> int:
        """Rate of the waveforms it takes, Hz."""
        return self.features.sample_rate

    @property
    def frame_s(self) -> float:
        """Seconds of one output frame."""
        return self.subsampling * self.features.hop_ms / 1000

    def latency_s(self, profile: str) -> float:
        """Longest time that a profile waits for audio: chunk, right context, front end, seconds."""
        window = self.profiles[profile].window_feature_frames
        overlap_s = (self.features.window_ms - self.features.hop_ms) / 1000
        return window * self.features.hop_ms / 1000 + overlap_s

    @property
    def best_decoder(self) -> DecoderName:
        """The most accurate of those that were loaded, which requests get that name none."""
        by_accuracy: tuple[DecoderName, ...] = ("rescored", "beam", *self.decoders)
        return next(name for name in by_accuracy if name in self.decoders)

    def decoder(self, name: DecoderName) -> Decoder:
        """The decoder of that name.

        Raises:
            RequestError: it was not loaded.
        """
        if name not in self.decoders:
            raise RequestError(
                f"the decoder {name} is not there; this model has {', '.join(self.decoders)}"
            )
        return self.decoders[name]

    def in_domain(self, name: str) -> Recogniser:
        """This recogniser, listening for what belongs to a domain; itself for an empty name.

        Raises:
            RequestError: there is no such domain.
        """
        if not name:
            return self
        if name not in self.domains:
            known = ", ".join(self.domains) or "none"
            raise RequestError(f"there is no domain {name!r}; this model has {known}")
        return self.domains[name]

    @cached_property
    def greedy(self) -> GreedyDecoder:
        """For interim results of decoders that cannot search chunk by chunk."""
        return GreedyDecoder(self.tokens)

    def columns(self, decoder: DecoderName) -> slice:
        """The columns of an emission that a decoder reads."""
        n_tokens = len(self.tokens)
        return slice(n_tokens, None) if decoder in self.phone_decoders else slice(n_tokens)

    def warm_up(self) -> None:
        """Run every stage once, so that no request pays for what the first run sets up."""
        noise = np.random.default_rng(0).normal(size=int(_WARM_UP_S * self.sample_rate))
        for decoder in self.decoders:
            self.recognise((0.1 * noise).astype(np.float32), decoder=decoder, n_best=2)
        for (name, profile), decoder in product(self.profiles.items(), self.decoders):
            window = np.zeros((profile.window_feature_frames, self.features.n_mels), np.float32)
            self.open_first_pass(name, decoder).push(window)

    def recognise(
        self,
        waveform: FloatArray,
        *,
        decoder: DecoderName,
        n_best: int = 1,
        phrases: Sequence[Phrase] = (),
    ) -> list[Segment]:
        """Recognise a whole recording.

        Args:
            waveform: mono samples in [-1, 1], float32, (time,), at `sample_rate`.
            decoder: how emissions are searched.
            n_best: alternatives wanted for each segment.
            phrases: what is expected or unwanted.

        Returns:
            Consecutive segments, at least one.

        Raises:
            InputError: a phrase cannot be used, or there is no such decoder.
        """
        return list(
            self.recognise_blocks([waveform], decoder=decoder, n_best=n_best, phrases=phrases)
        )

    def recognise_blocks(
        self,
        blocks: Iterable[FloatArray],
        *,
        decoder: DecoderName,
        n_best: int = 1,
        phrases: Sequence[Phrase] = (),
        on_audio: Callable[[float], object] = lambda _: None,
    ) -> Iterator[Segment]:
        """Recognise a recording that is read block by block; memory does not grow with it.

        Args:
            blocks: consecutive samples, each as `recognise` takes them.
            decoder: how emissions are searched.
            n_best: alternatives wanted for each segment.
            phrases: what is expected or unwanted.
            on_audio: called with the seconds of audio that were dealt with since the last call.

        Yields:
            Consecutive segments, at least one: the whole recording, or where it is longer than
            `LONGEST_WHOLE_S` its utterances.
        """
        whole, frames = self._take_whole(self._features_of(blocks))
        if frames is None:
            yield self.segment(
                self.emission(whole, decoder),
                first_frame=0,
                decoder=decoder,
                n_best=n_best,
                phrases=phrases,
            )
            on_audio(len(whole) * self.features.hop_ms / 1000)
            return
        n_feature_frames = 0

        def count(pieces: Iterable[FloatArray]) -> Iterator[FloatArray]:
            nonlocal n_feature_frames
            for piece in pieces:
                n_feature_frames += len(piece)
                yield piece

        first_frame = 0
        utterances = self._utterances(count(chain([whole], frames)), decoder)
        for batch in _batches(utterances, self.utterances_at_once):
            emissions = self.emissions([utterance.features for utterance in batch], decoder)
            for utterance, emission in zip(batch, emissions, strict=True):
                yield self.segment(
                    emission,
                    first_frame=utterance.first_frame,
                    earliest_frame=utterance.earliest_frame,
                    decoder=decoder,
                    n_best=n_best,
                    phrases=phrases,
                )
                end_frame = utterance.first_frame + len(emission)
                on_audio((end_frame - first_frame) * self.frame_s)
                first_frame = end_frame
        rest_s = n_feature_frames * self.features.hop_ms / 1000 - first_frame * self.frame_s
        on_audio(max(0.0, rest_s))

    def _features_of(self, blocks: Iterable[FloatArray]) -> Iterator[FloatArray]:
        stream = FeatureStream(self.features)
        for block in blocks:
            for piece in np.array_split(block, 1 + len(block) // _PIECE_SAMPLES):
                start = time.perf_counter()
                features = stream.push(piece)
                self.timings.features_s += time.perf_counter() - start
                yield features

    def _take_whole(
        self, frames: Iterator[FloatArray]
    ) -> tuple[FloatArray, Iterator[FloatArray] | None]:
        """All features of a short recording and None, or the first ones and the others."""
        longest = LONGEST_WHOLE_S * 1000 / self.features.hop_ms
        taken = [np.zeros((0, self.features.n_mels), np.float32)]
        n_taken = 0
        for piece in frames:
            taken.append(piece)
            n_taken += len(piece)
            if n_taken > longest:
                return np.concatenate(taken), frames
        return np.concatenate(taken), None

    def _utterances(
        self, frames: Iterable[FloatArray], decoder: DecoderName
    ) -> Iterator[Utterance]:
        """Cut the features of a long recording into utterances, at least one."""
        segmenter = self.open_segmenter(DEFAULT_PROFILE, EndpointSettings(), decoder)
        n_utterances = 0
        for piece in frames:
            start = time.perf_counter()
            events = list(segmenter.push(piece))
            self.timings.segmentation_s += time.perf_counter() - start
            for event in events:
                if isinstance(event, UtteranceEnded):
                    n_utterances += 1
                    yield event.utterance
        for event in segmenter.finish():
            if isinstance(event, UtteranceEnded) and (
                event.utterance.has_speech or n_utterances == 0
            ):
                yield event.utterance

    def open_first_pass(self, profile: str, decoder: DecoderName) -> FirstPass:
        """The first pass over a new stream, read as the profile of that name says.

        Its log_probs are those of the columns that the decoder reads; the others may be NaN.
        """
        return FirstPass(
            self.streaming_engine,
            self.profiles[profile],
            n_mels=self.features.n_mels,
            n_units=len(self.tokens) + len(self.phones),
            subsampling=self.subsampling,
            spell=decoder not in self.phone_decoders,
            mute=self._mute_silence,
        )

    def recognise_first_pass(
        self, blocks: Iterable[FloatArray], *, decoder: DecoderName, profile: str
    ) -> Iterator[Segment]:
        """Recognise a recording as one utterance, by the first pass of a stream alone.

        Args:
            blocks: consecutive samples, each as `recognise` takes them.
            decoder: how emissions are searched.
            profile: how the stream is read.

        Yields:
            One segment.
        """
        first_pass = self.open_first_pass(profile, decoder)
        emission = []
        for features in self._features_of(blocks):
            start = time.perf_counter()
            emission.append(first_pass.push(features))
            self.timings.acoustic_model_s += time.perf_counter() - start
        emission.append(first_pass.finish())
        yield self.segment(np.concatenate(emission), first_frame=0, decoder=decoder)

    def open_segmenter(
        self, profile: str, endpointing: EndpointSettings, decoder: DecoderName
    ) -> Segmenter:
        """What cuts a new stream into utterances, for a decoder."""
        units = self.phones if decoder in self.phone_decoders else self.tokens
        return Segmenter(
            self.open_first_pass(profile, decoder),
            endpointing,
            subsampling=self.subsampling,
            frame_s=self.frame_s,
            columns=self.columns(decoder),
            space=units.index(SPACE) if SPACE in units else None,
        )

    def segment(
        self,
        emission: FloatArray,
        *,
        first_frame: int,
        earliest_frame: int = 0,
        decoder: DecoderName,
        n_best: int = 1,
        phrases: Sequence[Phrase] = (),
    ) -> Segment:
        """Decode the emission of one segment.

        Args:
            emission: log_probs, float32, (frames, unit).
            first_frame: output frames of the recording before it.
            earliest_frame: where the segment before it ended; the silence between may be in both.
            decoder: how it is searched.
            n_best: alternatives wanted.
            phrases: what is expected or unwanted.

        Raises:
            InputError: a phrase cannot be used, or there is no such decoder.
        """
        start = time.perf_counter()
        searched = emission[:, self.columns(decoder)]
        n_read = n_best if self.domain is None else max(n_best, READINGS)
        hypotheses = self.decoder(decoder).decode(searched, n_best=n_read, phrases=phrases)
        self.timings.decoding_s += time.perf_counter() - start
        alternatives = tuple(
            self._to_alternative(h, first_frame, earliest_frame) for h in hypotheses
        )
        segment = Segment(alternatives, end_s=(first_frame + len(emission)) * self.frame_s)
        if self.domain is None:
            return segment
        understood = _understand(segment, self.domain)
        return replace(understood, alternatives=understood.alternatives[:n_best])

    def emission(self, features: FloatArray, decoder: DecoderName | None = None) -> FloatArray:
        """Compute the log_probs of one utterance; see `emissions`."""
        return self.emissions([features], decoder)[0]

    def emissions(
        self, utterances: Sequence[FloatArray], decoder: DecoderName | None = None
    ) -> list[FloatArray]:
        """Compute the log_probs of utterances with full context, as one batch.

        Args:
            utterances: log-mel energies, float32, each (time, mel).
            decoder: which one will read them: the columns that it does not read may be NaN. None
                computes all.

        Returns:
            Log probabilities, float32, each (frames, unit): tokens, then phones.
        """
        n_frames = np.array([len(features) for features in utterances])
        n_units = len(self.tokens) + len(self.phones)
        emissions = [np.zeros((0, n_units), np.float32) for _ in utterances]
        filled = np.flatnonzero(n_frames)
        if len(filled) == 0:
            return emissions
        start = time.perf_counter()
        batch = np.zeros((len(filled), n_frames.max(), self.features.n_mels), np.float32)
        for row, i in enumerate(filled):
            batch[row, : n_frames[i]] = utterances[i]
        spell = decoder not in self.phone_decoders
        log_probs = self.engine.log_probs(batch, n_frames[filled], spell=spell)
        self.timings.acoustic_model_s += time.perf_counter() - start
        for row, i in enumerate(filled):
            emissions[i] = log_probs[row, : -(-int(n_frames[i]) // self.subsampling)]
            self._mute_silence(emissions[i], utterances[i])
        return emissions

    def _mute_silence(self, emission: FloatArray, window: FloatArray) -> None:
        """Allow no speech where the audio is silent: the model has only heard live recordings."""
        n_frames = len(emission)
        loudness = np.full(n_frames * self.subsampling, -np.inf, np.float32)
        loudness[: len(window)] = window.max(axis=1)[: len(loudness)]
        silent = loudness.reshape(n_frames, -1).max(axis=1) < _SILENCE_LOG_ENERGY
        if silent.any():
            units = (*self.tokens, *self.phones)
            speech = [i for i, unit in enumerate(units) if unit not in (BLANK_TOKEN, SPACE)]
            emission[np.ix_(silent, speech)] = _NEVER

    def timed_words(
        self, words: Iterable[Word], *, first_frame: int = 0, earliest_frame: int = 0
    ) -> tuple[TimedWord, ...]:
        """A decoder's words on the clock of the recording.

        Args:
            words: in order.
            first_frame: output frames of the recording before those that the words count from.
            earliest_frame: no word begins before it.

        Returns:
            The words; each lasts at least a frame, none begins before the one before it ended.
        """
        timed = []
        earliest = float(earliest_frame)
        for word in words:
            start = max(earliest, first_frame + word.start_frame)
            earliest = max(start + 1, first_frame + word.end_frame)
            timed.append(
                TimedWord(
                    text=word.text,
                    start_s=start * self.frame_s,
                    end_s=earliest * self.frame_s,
                    confidence=min(1.0, max(0.0, word.confidence)),
                )
            )
        return tuple(timed)

    def _to_alternative(
        self, hypothesis: Hypothesis, first_frame: int, earliest_frame: int
    ) -> Alternative:
        words = self.timed_words(
            hypothesis.words, first_frame=first_frame, earliest_frame=earliest_frame
        )
        return Alternative(words, score=hypothesis.score, confidence=hypothesis.confidence)


def _understand(segment: Segment, domain: Domain) -> Segment:
    """The segment with the reading that makes sense first, and what it means."""
    alternatives = segment.alternatives
    found = domain.interpret(
        [[word.text for word in reading.words] for reading in alternatives],
        [reading.confidence for reading in alternatives],
    )
    chosen = alternatives[found.reading]
    slots = tuple(
        Slot(
            name=slot.name,
            value=slot.value,
            raw=" ".join(word.text for word in chosen.words[slot.begin : slot.end]),
            start_s=chosen.words[slot.begin].start_s,
            end_s=chosen.words[slot.end - 1].end_s,
            confidence=slot.confidence
            * min(word.confidence for word in chosen.words[slot.begin : slot.end]),
        )
        for slot in found.slots
    )
    others = (*alternatives[: found.reading], *alternatives[found.reading + 1 :])
    return replace(
        segment,
        alternatives=(chosen, *others),
        intent=Intent(found.intent, found.confidence),
        slots=slots,
    )


def load_recogniser(
    folder: Path,
    *,
    provider: Provider = "cpu",
    n_threads: int = 1,
    decoders: Sequence[DecoderName] | Literal["best"] | None = None,
    domains: Sequence[Path] = (),
) -> Recogniser:
    """Load a bundle, ready to use.

    Args:
        folder: the bundle.
        provider: where the acoustic model runs.
        n_threads: threads of one run of the acoustic model and of numpy.
        decoders: which decoders are made; all but `greedy` load the language model. `best` makes
            the most accurate one, None all that the bundle has, but for the reference.
        domains: folders of the domains that can be asked for.

    Raises:
        BundleError: the bundle is missing, incomplete, altered, or of another format.
        ProviderError: the provider is not there.
    """
    threadpool_limits(n_threads)
    bundle = load_bundle(folder)
    config = bundle.config
    rescored: list[DecoderName] = ["rescored"] if bundle.rescorer_graph else []
    if decoders == "best":
        decoders = rescored or ["beam"]
    elif decoders is None:
        phones: list[DecoderName] = ["beam-phones"] if bundle.has_lexicon else []
        decoders = ["greedy", "beam", "beam-characters", *phones, *rescored]
    recogniser = Recogniser(
        name=config.name,
        language=config.language,
        features=config.features,
        subsampling=config.subsampling,
        tokens=config.tokens,
        phones=config.phones,
        engine=OnnxEngine(bundle.offline_graph, provider=provider, n_threads=n_threads),
        streaming_engine=OnnxStreamingEngine(
            bundle.streaming_graph, provider=provider, n_threads=n_threads
        ),
        profiles=config.profiles,
        survival=config.survival,
        decoders=make_decoders(bundle, decoders),
        utterances_at_once=1 if provider == "cpu" else _UTTERANCES_ON_GPU,
        phone_decoders=frozenset(
            name for name in decoders if _search_tokens(name, bundle) == "phones"
        ),
    )
    announce()
    recogniser.warm_up()
    return _add_domains(recogniser, bundle, domains)


def _add_domains(recogniser: Recogniser, bundle: Bundle, folders: Sequence[Path]) -> Recogniser:
    """A recogniser that can also listen for some domains.

    Args:
        recogniser: of the bundle.
        bundle: whose settings the searches take.
        folders: what `voxgate domain build` wrote.

    Raises:
        BundleError: a domain cannot be used, or two have one name.
    """
    domains = dict(recogniser.domains)
    for folder in folders:
        domain = load_domain(folder)
        name = domain.config.name
        if name in domains:
            raise BundleError(f"{folder} is a second domain {name}; expected each name once")
        domains[name] = replace(
            recogniser, decoders=_domain_decoders(recogniser, bundle, domain), domain=domain
        )
    return replace(recogniser, domains=domains)


def _domain_decoders(
    recogniser: Recogniser, bundle: Bundle, domain: Domain
) -> dict[DecoderName, Decoder]:
    """The recogniser's decoders, with the domain's language model where they have one.

    What is said in a domain is no running text, so `rescored` is its search alone.
    """
    update = domain.config.search.model_dump(exclude_none=True)
    searches: dict[SearchTokens, BeamDecoder] = {}
    decoders: dict[DecoderName, Decoder] = {}
    for name, decoder in recogniser.decoders.items():
        if name == "greedy":
            decoders[name] = decoder
        elif name != "reference":
            head = _search_tokens(name, bundle)
            if head not in searches:
                settings = bundle.config.decoding.of(head).model_copy(update=update)
                searches[head] = make_beam_decoder(
                    bundle, domain.lm, head, settings, lexicon=domain.lexicon
                )
            decoders[name] = searches[head]
    return decoders


def make_decoders(bundle: Bundle, names: Sequence[DecoderName]) -> dict[DecoderName, Decoder]:
    """The decoders of a bundle; those that are the same share everything.

    Raises:
        BundleError: the bundle lacks what a decoder needs.
    """
    searches: dict[SearchTokens, BeamDecoder] = {}
    lm = load_ngram(bundle.ngram) if bundle.ngram and set(names) != {"greedy"} else None
    decoders: dict[DecoderName, Decoder] = {}
    for name in names:
        search_tokens = _search_tokens(name, bundle)
        if name == "greedy":
            decoders[name] = GreedyDecoder(bundle.config.tokens)
        elif name == "reference":
            decoders[name] = _make_reference(bundle, lm)
        else:
            if search_tokens not in searches:
                searches[search_tokens] = make_beam_decoder(
                    bundle, lm, search_tokens, bundle.config.decoding.of(search_tokens)
                )
            search = searches[search_tokens]
            decoders[name] = _add_rescorer(search, bundle, lm) if name == "rescored" else search
    return decoders


def _add_rescorer(search: BeamDecoder, bundle: Bundle, lm: NgramModel | None) -> RescoringDecoder:
    if bundle.rescorer_graph is None or lm is None:
        raise BundleError(
            f"{bundle.folder} has no recurrent language model for a second pass; export it with "
            "--lm and --rescorer, or use the decoder beam"
        )
    rescorer = Rescorer(bundle.rescorer_graph)
    return RescoringDecoder(search, rescorer, lm, bundle.config.decoding.rescoring)


def make_beam_decoder(
    bundle: Bundle,
    lm: NgramModel | None,
    search_tokens: SearchTokens,
    settings: DecoderSettings,
    *,
    lexicon: Lexicon | None = None,
) -> BeamDecoder:
    """The search over one head of a bundle's model.

    Args:
        bundle: the bundle.
        lm: language model.
        search_tokens: which head.
        settings: of the search.
        lexicon: pronunciations; None takes the bundle's.

    Raises:
        BundleError: phones are asked for and the bundle has no lexicon.
    """
    values = settings.model_dump(exclude={"confidence"})
    calibration = WordCalibration(**settings.confidence.model_dump())
    if search_tokens == "characters":
        return BeamDecoder(bundle.config.tokens, lm=lm, calibration=calibration, **values)
    if not (bundle.has_lexicon and lm):
        raise BundleError(
            f"{bundle.folder} has no lexicon, so its phones cannot be searched; export it with "
            "--lm and --g2p, or search characters"
        )
    return BeamDecoder(
        bundle.config.phones,
        lm=lm,
        lexicon=bundle.read_lexicon() if lexicon is None else lexicon,
        pronounce=Pronouncer(bundle.g2p_graph).pronounce if bundle.g2p_graph else None,
        calibration=calibration,
        **values,
    )


def _search_tokens(name: DecoderName, bundle: Bundle) -> SearchTokens:
    if name in ("beam", "rescored"):
        return bundle.config.decoding.search_tokens
    return "phones" if name == "beam-phones" else "characters"


def _make_reference(bundle: Bundle, lm: NgramModel | None) -> ReferenceDecoder:
    settings = bundle.config.decoding.reference.model_dump()
    if lm is None:
        return ReferenceDecoder(bundle.config.tokens, **settings)
    return ReferenceDecoder(
        bundle.config.tokens, lm=load_kenlm(lm), words=lm.vocabulary, **settings
    )


def _batches(utterances: Iterable[Utterance], size: int) -> Iterator[list[Utterance]]:
    waiting = iter(utterances)
    while batch := list(islice(waiting, size)):
        yield batch
