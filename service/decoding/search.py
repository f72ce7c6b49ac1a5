"""CTC prefix beam search, compiled.

A prefix is a sequence of tokens without blanks; the search sums over the ways in which CTC may
spell it (Hannun et al., 2014). Prefixes form a tree: a node is its parent's prefix and one edge, a
token and, where that token shows that a word has ended, the word. Each node carries what its
future depends on: the place in the trie of spellings, the state of the language model, the state of
the phrase automaton. The mass of a prefix is its CTC probability times its language score, so an
edge's mass is one product; masses are scaled so that the best prefix of a frame has 1.

Two kinds of token list are searched. Where a token stands between words (characters), it ends the
word, and words that the trie lacks may be allowed at a price. Where none does (phones), the first
token of the next word ends the word, and what is spelled alike gives one edge a word.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from service.decoding.compiled import allocating, compiled, inlined
from service.decoding.ngram import NgramTables, score_word
from service.decoding.phrases import DEAD, PhraseAutomaton, completes, follow
from service.decoding.trie import Trie

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]
LongArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

NO_PHRASES: Final = 2
"""States of a phrase automaton without phrases."""
NO_WORD: Final = -1
OFF_TRIE: Final = -1

# places in `SearchState.counts`
N_SLOTS: Final = 0
N_FREE: Final = 1
N_FRAMES: Final = 2
N_COUNTS: Final = 3

_CACHE_SIZE: Final = 2048  # a power of two
_CANDIDATES_A_PREFIX: Final = 8
_SPARE_CANDIDATES: Final = 1024
_UNUSED: Final = -2
LEAST_FREE: Final = 8  # a part of the nodes
_LEAST_SHARE: Final = 1e-3


class SearchSettings(NamedTuple):
    """What a search is asked for."""

    n_tokens: int
    blank: int
    boundary: int
    """Token between words; −1 where there is none."""
    beam_width: int
    """Prefixes kept after each frame."""
    beam_prune: float
    """Prefixes with less than this share of the best one's mass are dropped."""
    token_min_log_prob: float
    """Tokens below this in a frame begin no edge."""
    lm_weight: float
    """Factor of the language model's base 10 log probability in natural log scores."""
    word_score: float
    """Natural log score of each word."""
    has_lm: bool
    open_vocabulary: bool
    """Whether words outside the trie are allowed."""
    recombines: bool
    """Whether prefixes with the same future are searched as one."""
    unknown_share: float
    """What such a word multiplies the mass by, beside the language model."""
    phrase_share: float
    """Look-ahead of a phrase's word that the trie lacks."""
    largest_gain: float
    """The most that a word's end multiplies the mass by, its look-ahead aside."""
    unknown_word: int
    """Number of the unknown word."""
    end_word: int
    """Number of the sentence end."""
    n_lm_words: int
    """Words with a number from here on are unknown to the language model."""


class Knowledge(NamedTuple):
    """What a search knows of the language; it is read only and shared."""

    settings: SearchSettings
    trie: Trie
    look_ahead: DoubleArray
    """Share of the mass that a word under way is given at each node of the trie, float64."""
    may_begin: BoolArray
    """Tokens with which a word may begin, bool, (token,)."""
    may_continue: BoolArray
    """Tokens with which it may go on."""
    lm: NgramTables
    phrases: PhraseAutomaton


class SearchState(NamedTuple):
    """Everything that a search carries from frame to frame; `n` is the capacity of the tree."""

    counts: LongArray
    """Slots in use, free nodes, frames read."""
    log_scale: DoubleArray
    """Log of what the masses were divided by, float64, (1,)."""
    slot_node: IntArray
    """Node of each prefix in the beam, int32, (beam,)."""
    blank_mass: DoubleArray
    """Mass of the ways that end in a blank, float64, (beam,)."""
    token_mass: DoubleArray
    """Mass of the ways that end in the last token, float64, (beam,)."""
    free: IntArray
    """Stack of unused nodes, int32, (n,)."""
    parent: IntArray
    first_child: IntArray
    next_sibling: IntArray
    slot_of: IntArray
    """Place of each node in the beam, −1 outside, int32, (n,)."""
    token: IntArray
    word: IntArray
    """Word that ended with the edge, `NO_WORD` inside words, int32, (n,)."""
    place: IntArray
    """Node of the trie, `OFF_TRIE` for a word it lacks, int32, (n,)."""
    phrase: IntArray
    """State of the phrase automaton, int32, (n,)."""
    lm_state: IntArray
    """State of the language model before the running word, int32, (n, order − 1)."""
    factor: DoubleArray
    """What the edge multiplies the mass by, beside its token's probability, float64, (n,)."""
    look: DoubleArray
    """Share of the mass that the running word was given ahead of its end, float64, (n,)."""
    n_words: IntArray
    """Words that have ended before the running one, int32, (n,)."""
    first_frame: IntArray
    """Frame at which most of the mass arrived, int32, (n,)."""
    last_frame: IntArray
    """Frame in which the token was last heard, int32, (n,)."""
    peak: FloatArray
    """Log probability of the token in `first_frame`, float32, (n,)."""
    entropy: FloatArray
    """Of all tokens in `first_frame`, natural log, float32, (n,)."""
    own_share: DoubleArray
    """Share of a node's mass that came along its own edge, float64, (n,)."""
    share: DoubleArray
    """Share that a rival has of its winner's mass, float64, (n,)."""
    winner: IntArray
    """The node that stands for this one, −1 where it stands for itself, int32, (n,)."""
    first_rival: IntArray
    """First of the nodes that this one stands for, −1 for none, int32, (n,)."""
    next_rival: IntArray
    cache_key: LongArray
    """Recent questions to the language model, int64, (2048,)."""
    cache_gain: DoubleArray


def new_state(knowledge: Knowledge, *, capacity: int, lm_start: IntArray) -> SearchState:
    """A search before its first frame, with the empty prefix in its beam."""
    width = knowledge.settings.beam_width

    def integers(n: int, value: int = 0) -> IntArray:
        return np.full(n, value, np.int32)

    state = SearchState(
        counts=np.zeros(N_COUNTS, np.int64),
        log_scale=np.zeros(1),
        slot_node=integers(width),
        blank_mass=np.zeros(width),
        token_mass=np.zeros(width),
        free=np.arange(capacity - 1, -1, -1, dtype=np.int32),
        parent=integers(capacity, -1),
        first_child=integers(capacity, -1),
        next_sibling=integers(capacity, -1),
        slot_of=integers(capacity, -1),
        token=integers(capacity, -1),
        word=integers(capacity, NO_WORD),
        place=integers(capacity),
        phrase=integers(capacity),
        lm_state=np.full((capacity, len(lm_start)), -1, np.int32),
        factor=np.ones(capacity),
        look=np.ones(capacity),
        n_words=integers(capacity),
        first_frame=integers(capacity),
        last_frame=integers(capacity),
        peak=np.zeros(capacity, np.float32),
        entropy=np.zeros(capacity, np.float32),
        own_share=np.ones(capacity),
        share=np.zeros(capacity),
        winner=integers(capacity, -1),
        first_rival=integers(capacity, -1),
        next_rival=integers(capacity, -1),
        cache_key=np.full(_CACHE_SIZE, -1, np.int64),
        cache_gain=np.zeros(_CACHE_SIZE),
    )
    state.counts[N_SLOTS] = 1
    state.counts[N_FREE] = capacity - 1  # node 0 is the empty prefix
    state.blank_mass[0] = 1.0
    state.slot_of[0] = 0
    state.token[0] = knowledge.settings.boundary
    state.lm_state[0] = lm_start
    return state


class Scratch(NamedTuple):
    """What a frame needs; nothing of it outlives the frame."""

    probs: DoubleArray
    kept: IntArray
    """Tokens that may begin an edge, likely ones first."""
    is_kept: BoolArray
    child_of: IntArray
    """Child of the prefix at hand by token, −1 where there is none."""
    new_blank: DoubleArray
    new_token: DoubleArray
    inflow: DoubleArray
    """Mass that came from the parent, float64, (beam,)."""
    scores: DoubleArray
    lm_state: IntArray
    slot_table: IntArray
    """Slots by what their future depends on, open addressing."""
    n_found: LongArray
    best: DoubleArray
    """Largest mass so far, float64, (1,)."""
    floor: DoubleArray
    """What the last place in the next beam has at least, float64, (1,)."""
    entropy: DoubleArray
    """Of the frame's tokens, float64, (1,)."""
    # candidates: prefixes that may enter the beam
    slot: IntArray
    """Slot of the parent."""
    node: IntArray
    """The node, −1 where it must be made."""
    token: IntArray
    word: IntArray
    place: IntArray
    phrase: IntArray
    factor: DoubleArray
    look: DoubleArray
    mass: DoubleArray


def new_scratch(knowledge: Knowledge) -> Scratch:
    """Room for the frames of one search at a time."""
    settings = knowledge.settings
    width = settings.beam_width
    limit = _CANDIDATES_A_PREFIX * width + _SPARE_CANDIDATES

    def integers() -> IntArray:
        return np.empty(limit, np.int32)

    return Scratch(
        probs=np.empty(settings.n_tokens),
        kept=np.empty(settings.n_tokens, np.int32),
        is_kept=np.zeros(settings.n_tokens, np.bool_),
        child_of=np.full(settings.n_tokens, -1, np.int32),
        new_blank=np.empty(width),
        new_token=np.empty(width),
        inflow=np.empty(width),
        scores=np.empty(width + limit),
        lm_state=np.empty(max(1, knowledge.lm.order - 1), np.int32),
        slot_table=np.empty(1 << (4 * width).bit_length(), np.int32),
        n_found=np.zeros(1, np.int64),
        best=np.zeros(1),
        floor=np.zeros(1),
        entropy=np.zeros(1),
        slot=integers(),
        node=integers(),
        token=integers(),
        word=integers(),
        place=integers(),
        phrase=integers(),
        factor=np.empty(limit),
        look=np.empty(limit),
        mass=np.empty(limit),
    )


@compiled
def advance(
    knowledge: Knowledge, state: SearchState, scratch: Scratch, log_probs: FloatArray
) -> int:
    """Read frames until there are no more, or no more nodes for the next one.

    Args:
        knowledge: what is searched for.
        state: changed in place.
        scratch: overwritten.
        log_probs: float32, (frames, token), every row with a finite maximum.

    Returns:
        How many frames were read. Before the others there must be room: see `cut`.
    """
    settings = knowledge.settings
    for row in range(len(log_probs)):
        if state.counts[N_FREE] < settings.beam_width:
            sweep(state)
            if state.counts[N_FREE] < max(settings.beam_width, len(state.free) // LEAST_FREE):
                return row
        n_kept = _choose_tokens(settings, log_probs[row], scratch)
        _stay(settings, state, scratch)
        if n_kept > 0:
            for slot in range(state.counts[N_SLOTS]):
                _extend(knowledge, state, scratch, slot, n_kept)
        if scratch.best[0] > 0.0:  # otherwise nothing that is allowed was heard: skip the frame
            _note_arrivals(state, scratch, log_probs[row])
            _select(knowledge, state, scratch, log_probs[row])
            if settings.recombines:
                _recombine(state, scratch)
        state.counts[N_FRAMES] += 1
    return len(log_probs)


@inlined
def _choose_tokens(settings: SearchSettings, log_probs: FloatArray, scratch: Scratch) -> int:
    """Fill in the probabilities and the tokens worth an edge, likely ones first; how many."""
    n_kept = 0
    entropy = 0.0
    for token in range(settings.n_tokens):
        scratch.probs[token] = math.exp(log_probs[token])
        if scratch.probs[token] > 0.0:
            entropy -= scratch.probs[token] * log_probs[token]
        is_kept = token != settings.blank and log_probs[token] >= settings.token_min_log_prob
        scratch.is_kept[token] = is_kept
        if is_kept:
            at = n_kept
            while at > 0 and log_probs[scratch.kept[at - 1]] < log_probs[token]:
                scratch.kept[at] = scratch.kept[at - 1]
                at -= 1
            scratch.kept[at] = token
            n_kept += 1
    scratch.entropy[0] = entropy
    return n_kept


@inlined
def _stay(settings: SearchSettings, state: SearchState, scratch: Scratch) -> None:
    """The masses of prefixes that do not grow in this frame."""
    best, least = 0.0, math.inf
    for slot in range(state.counts[N_SLOTS]):
        token = state.token[state.slot_node[slot]]
        total = state.blank_mass[slot] + state.token_mass[slot]
        scratch.new_blank[slot] = total * scratch.probs[settings.blank]
        if token < 0:
            scratch.new_token[slot] = 0.0
        elif token == settings.boundary:  # further boundaries are the same one
            scratch.new_token[slot] = total * scratch.probs[token]
        else:
            scratch.new_token[slot] = state.token_mass[slot] * scratch.probs[token]
        scratch.inflow[slot] = 0.0
        mass = scratch.new_blank[slot] + scratch.new_token[slot]
        best, least = max(best, mass), min(least, mass)
    scratch.best[0] = best
    scratch.floor[0] = least if state.counts[N_SLOTS] == settings.beam_width else 0.0
    scratch.n_found[0] = 0


@inlined
def _extend(
    knowledge: Knowledge, state: SearchState, scratch: Scratch, slot: int, n_kept: int
) -> None:
    """Let one prefix grow by each token."""
    settings, trie = knowledge.settings, knowledge.trie
    node = state.slot_node[slot]
    last = state.token[node]
    place = state.place[node]
    has_boundary = settings.boundary >= 0
    is_start = place == 0
    total = state.blank_mass[slot] + state.token_mass[slot]
    child = state.first_child[node]
    while child >= 0:
        token = state.token[child]
        if scratch.is_kept[token]:
            source = state.blank_mass[slot] if token == last else total
            _offer(settings, state, scratch, slot, token, source * scratch.probs[token], child)
        if has_boundary or state.word[child] == NO_WORD:
            scratch.child_of[token] = child
        child = state.next_sibling[child]
    # in the trie the share of a running word only falls
    only_falls = place >= 0 and len(knowledge.phrases.credit) == NO_PHRASES
    only_falls = only_falls and not settings.open_vocabulary
    for i in range(n_kept):
        token = scratch.kept[i]
        source = state.blank_mass[slot] if token == last else total
        mass = source * scratch.probs[token]
        if scratch.child_of[token] >= 0:
            continue
        if token == settings.boundary:
            if last != token:
                _end_word(knowledge, state, scratch, slot, token, mass)
        elif only_falls and total * scratch.probs[token] <= _limit(settings, scratch):
            if not has_boundary:
                break  # the others are less likely
        elif knowledge.may_begin[token] if is_start else knowledge.may_continue[token]:
            following = find_child(trie, place, token) if place >= 0 else OFF_TRIE
            _spell(knowledge, state, scratch, slot, token, mass, following)
    if not (has_boundary or is_start):
        _end_words(knowledge, state, scratch, slot, n_kept)
    child = state.first_child[node]
    while child >= 0:
        scratch.child_of[state.token[child]] = -1
        child = state.next_sibling[child]


@inlined
def _limit(settings: SearchSettings, scratch: Scratch) -> float:
    """The mass up to which a prefix has no place in the next beam."""
    return max(scratch.best[0] * settings.beam_prune, scratch.floor[0])


@inlined
def _offer(
    settings: SearchSettings,
    state: SearchState,
    scratch: Scratch,
    slot: int,
    token: int,
    mass: float,
    child: int,
) -> None:
    """Let mass flow along an edge that the tree has: into the beam, or to a candidate."""
    grown = mass * state.factor[child]
    target = state.slot_of[child]
    if target >= 0:
        scratch.new_token[target] += grown
        scratch.inflow[target] = grown
        scratch.best[0] = max(
            scratch.best[0], scratch.new_blank[target] + scratch.new_token[target]
        )
    elif grown > _limit(settings, scratch):
        at = _next_candidate(settings, scratch, slot, token, grown)
        scratch.node[at] = child


@compiled
def _next_candidate(
    settings: SearchSettings, scratch: Scratch, slot: int, token: int, mass: float
) -> int:
    """Note a candidate; where there are too many, the weakest are forgotten."""
    if scratch.n_found[0] == len(scratch.mass):
        _thin(scratch, settings.beam_width)
    at = scratch.n_found[0]
    scratch.n_found[0] = at + 1
    scratch.slot[at] = slot
    scratch.token[at] = token
    scratch.mass[at] = mass
    scratch.best[0] = max(scratch.best[0], mass)
    return at


@inlined
def _propose(
    settings: SearchSettings,
    scratch: Scratch,
    slot: int,
    token: int,
    mass: float,
    word: int,
    place: int,
    phrase: int,
    factor: float,
    look: float,
) -> None:
    """Note a candidate that the tree has no node for, unless it is too weak."""
    grown = mass * factor
    if grown > _limit(settings, scratch):
        at = _next_candidate(settings, scratch, slot, token, grown)
        scratch.node[at] = -1
        scratch.word[at] = word
        scratch.place[at] = place
        scratch.phrase[at] = phrase
        scratch.factor[at] = factor
        scratch.look[at] = look


@inlined
def _spell(
    knowledge: Knowledge,
    state: SearchState,
    scratch: Scratch,
    slot: int,
    token: int,
    mass: float,
    place: int,
) -> None:
    """Go on within a word, to a node of the trie or off it."""
    settings, phrases = knowledge.settings, knowledge.phrases
    node = state.slot_node[slot]
    phrase = state.phrase[node]
    following = DEAD if phrase == DEAD else follow(phrases, phrase, token, False)
    if place == OFF_TRIE and following == DEAD and not settings.open_vocabulary:
        return
    if place >= 0:
        look = knowledge.look_ahead[place]
    elif following == DEAD:
        look = settings.unknown_share
    else:
        look = settings.phrase_share
    factor = look / state.look[node] * phrases.credit[following] / phrases.credit[phrase]
    _propose(settings, scratch, slot, token, mass, NO_WORD, place, following, factor, look)


@inlined
def _end_word(
    knowledge: Knowledge, state: SearchState, scratch: Scratch, slot: int, token: int, mass: float
) -> None:
    """End the running word by the token between words."""
    settings, phrases = knowledge.settings, knowledge.phrases
    node = state.slot_node[slot]
    bound = mass * settings.largest_gain / state.look[node]
    if bound <= _limit(settings, scratch):
        return
    word = spelled_word(knowledge, state.place[node], state.phrase[node])
    if word == NO_WORD:
        return
    phrase = follow(phrases, state.phrase[node], token, True)
    gain = phrases.reward[phrase] * phrases.credit[phrase] / phrases.credit[state.phrase[node]]
    share = 1.0
    if word == settings.unknown_word and not completes(phrases, state.phrase[node], token):
        share = settings.unknown_share
    factor = word_gain(knowledge, state, node, word, scratch.lm_state) * share * gain
    factor /= state.look[node]
    _propose(settings, scratch, slot, token, mass, word, 0, phrase, factor, 1.0)


@compiled
def spelled_word(knowledge: Knowledge, place: int, phrase: int) -> int:
    """The word that ends here where a token ends words; `NO_WORD` where none may."""
    trie, settings = knowledge.trie, knowledge.settings
    if place >= 0 and trie.word_start[place] < trie.word_start[place + 1]:
        return trie.words[trie.word_start[place]]
    if settings.open_vocabulary or completes(knowledge.phrases, phrase, settings.boundary):
        return settings.unknown_word
    return NO_WORD


@compiled
def word_gain(
    knowledge: Knowledge, state: SearchState, node: int, word: int, following: IntArray
) -> float:
    """What a word that ends after a prefix multiplies its mass by, by the language model."""
    settings = knowledge.settings
    if not settings.has_lm:
        return math.exp(settings.word_score)
    known = word if word < settings.n_lm_words else settings.unknown_word
    history = 0  # nodes are numbered through the orders: the longest one says all
    for length in range(state.lm_state.shape[1]):
        if state.lm_state[node, length] < 0:
            break
        history = state.lm_state[node, length] + 1
    key = (np.int64(history) << 32) | known
    at = (history * 40_503 + known * 7_919) & (len(state.cache_key) - 1)
    if state.cache_key[at] != key:
        score = score_word(knowledge.lm, state.lm_state[node], known, following)
        state.cache_key[at] = key
        state.cache_gain[at] = math.exp(settings.lm_weight * score + settings.word_score)
    return state.cache_gain[at]


@inlined
def _end_words(
    knowledge: Knowledge, state: SearchState, scratch: Scratch, slot: int, n_kept: int
) -> None:
    """End the running word by the first token of the next one, for every word spelled so."""
    settings, trie, phrases = knowledge.settings, knowledge.trie, knowledge.phrases
    node = state.slot_node[slot]
    place = state.place[node]
    is_known = False
    if place > 0:
        for i in range(trie.word_start[place], trie.word_start[place + 1]):
            _begin_words(knowledge, state, scratch, slot, n_kept, trie.words[i])
            is_known = True
    chain = state.phrase[node]
    while chain > DEAD:
        for child in range(phrases.child_start[chain], phrases.child_start[chain + 1]):
            word = phrases.symbol[child] - settings.n_tokens
            if word >= settings.n_lm_words:
                _begin_words(knowledge, state, scratch, slot, n_kept, word)
                is_known = True
        chain = phrases.fail[chain]
    if settings.open_vocabulary and not is_known:
        _begin_words(knowledge, state, scratch, slot, n_kept, settings.unknown_word)


@compiled
def _begin_words(
    knowledge: Knowledge, state: SearchState, scratch: Scratch, slot: int, n_kept: int, word: int
) -> None:
    """End a word by each token that may begin the next one."""
    settings, phrases = knowledge.settings, knowledge.phrases
    node = state.slot_node[slot]
    total = state.blank_mass[slot] + state.token_mass[slot]
    between = follow(phrases, state.phrase[node], settings.n_tokens + word, True)
    gain = -1.0  # the word's, asked for when a token may be worth it
    most = settings.largest_gain / state.look[node]
    for i in range(n_kept):
        token = scratch.kept[i]
        if total * scratch.probs[token] * most <= _limit(settings, scratch):
            break  # the others are less likely
        source = state.blank_mass[slot] if token == state.token[node] else total
        mass = source * scratch.probs[token]
        if not knowledge.may_begin[token] or _has_edge(state, node, token, word):
            continue
        place = find_child(knowledge.trie, 0, token)
        phrase = follow(phrases, between, token, False)
        if place == OFF_TRIE and phrase == DEAD and not settings.open_vocabulary:
            continue
        if gain < 0.0:
            gain = word_gain(knowledge, state, node, word, scratch.lm_state)
            gain *= phrases.reward[between] / phrases.credit[state.phrase[node]] / state.look[node]
            if word == settings.unknown_word:
                gain *= settings.unknown_share
        if place >= 0:
            look = knowledge.look_ahead[place]
        else:
            look = settings.unknown_share if phrase == DEAD else settings.phrase_share
        factor = gain * phrases.credit[phrase] * look
        _propose(settings, scratch, slot, token, mass, word, place, phrase, factor, look)


@inlined
def _has_edge(state: SearchState, node: int, token: int, word: int) -> bool:
    """Whether the tree has what follows a node by a token that ends a word."""
    child = state.first_child[node]
    while child >= 0 and (state.token[child] != token or state.word[child] != word):
        child = state.next_sibling[child]
    return bool(child >= 0)


@compiled
def find_child(trie: Trie, place: int, token: int) -> int:
    """The node of the trie that continues `place` by a token, `OFF_TRIE` where there is none."""
    low, high = trie.child_start[place], trie.child_start[place + 1]
    end = high
    while low < high:
        middle = (low + high) >> 1
        if trie.token[middle] < token:
            low = middle + 1
        else:
            high = middle
    if low < end and trie.token[low] == token:
        return low
    return OFF_TRIE


@compiled
def _thin(scratch: Scratch, width: int) -> None:
    """Forget all candidates but the best."""
    n_found = scratch.n_found[0]
    for i in range(n_found):
        scratch.scores[i] = scratch.mass[i]
    least = kth_largest(scratch.scores, n_found, width)
    kept = 0
    for i in range(n_found):
        if scratch.mass[i] >= least and kept < width:
            scratch.slot[kept] = scratch.slot[i]
            scratch.node[kept] = scratch.node[i]
            scratch.token[kept] = scratch.token[i]
            scratch.word[kept] = scratch.word[i]
            scratch.place[kept] = scratch.place[i]
            scratch.phrase[kept] = scratch.phrase[i]
            scratch.factor[kept] = scratch.factor[i]
            scratch.look[kept] = scratch.look[i]
            scratch.mass[kept] = scratch.mass[i]
            kept += 1
    scratch.n_found[0] = kept
    scratch.floor[0] = max(scratch.floor[0], least)


@compiled
def kth_largest(values: DoubleArray, n: int, k: int) -> float:
    """The k-th largest of the first n values, which it reorders; the least where n < k."""
    low, high = 0, n - 1
    target = min(k, n) - 1
    while low < high:
        pivot = values[(low + high) >> 1]
        i, j = low, high
        while i <= j:
            while values[i] > pivot:
                i += 1
            while values[j] < pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if target <= j:
            high = j
        elif target >= i:
            low = i
        else:
            break
    return values[target]


@inlined
def _note_arrivals(state: SearchState, scratch: Scratch, log_probs: FloatArray) -> None:
    """Keep when the last token of each prefix was heard, and by which way its mass came."""
    frame = state.counts[N_FRAMES]
    for slot in range(state.counts[N_SLOTS]):
        node = state.slot_node[slot]
        total = scratch.new_blank[slot] + scratch.new_token[slot]
        inflow = scratch.inflow[slot]
        if inflow > total - inflow:
            state.first_frame[node] = frame
            state.last_frame[node] = frame
            state.peak[node] = log_probs[state.token[node]]
            state.entropy[node] = scratch.entropy[0]
        elif scratch.new_token[slot] > scratch.new_blank[slot]:
            state.last_frame[node] = frame
        if inflow > 0.0 and state.first_rival[node] >= 0:
            _scale_shares(state, node, (total - inflow) / total)
            state.own_share[node] += inflow / total


@compiled
def _scale_shares(state: SearchState, node: int, scale: float) -> None:
    state.own_share[node] *= scale
    rival = state.first_rival[node]
    while rival >= 0:
        state.share[rival] *= scale
        rival = state.next_rival[rival]


@inlined
def _select(
    knowledge: Knowledge, state: SearchState, scratch: Scratch, log_probs: FloatArray
) -> None:
    """Make the best prefixes the new beam and scale their masses."""
    settings = knowledge.settings
    width = settings.beam_width
    n_slots, n_found = state.counts[N_SLOTS], scratch.n_found[0]
    for slot in range(n_slots):
        scratch.scores[slot] = scratch.new_blank[slot] + scratch.new_token[slot]
    for i in range(n_found):
        scratch.scores[n_slots + i] = scratch.mass[i]
    least = scratch.best[0] * settings.beam_prune
    if n_slots + n_found > width:
        least = max(least, kth_largest(scratch.scores, n_slots + n_found, width))
    n_kept = 0
    for slot in range(n_slots):
        n_kept += scratch.new_blank[slot] + scratch.new_token[slot] >= least
    # candidates know their parents by slot: nodes are made before slots move
    n_new = 0
    for i in range(n_found):
        if scratch.mass[i] >= least and n_kept + n_new < width:
            node = scratch.node[i]
            if node < 0:
                node = _make_node(knowledge, state, scratch, i)
            state.first_frame[node] = state.counts[N_FRAMES]
            state.last_frame[node] = state.counts[N_FRAMES]
            state.peak[node] = log_probs[state.token[node]]
            state.entropy[node] = scratch.entropy[0]
            scratch.node[n_new] = node
            scratch.mass[n_new] = scratch.mass[i]
            n_new += 1
    scale = 1.0 / scratch.best[0]
    n_kept = 0
    for slot in range(n_slots):
        node = state.slot_node[slot]
        state.slot_of[node] = -1
        if scratch.new_blank[slot] + scratch.new_token[slot] >= least:
            state.slot_node[n_kept] = node
            state.slot_of[node] = n_kept
            state.blank_mass[n_kept] = scratch.new_blank[slot] * scale
            state.token_mass[n_kept] = scratch.new_token[slot] * scale
            n_kept += 1
    for i in range(n_new):
        state.slot_node[n_kept] = scratch.node[i]
        state.slot_of[scratch.node[i]] = n_kept
        state.blank_mass[n_kept] = 0.0
        state.token_mass[n_kept] = scratch.mass[i] * scale
        n_kept += 1
    state.counts[N_SLOTS] = n_kept
    state.log_scale[0] -= math.log(scale)


@inlined
def _recombine(state: SearchState, scratch: Scratch) -> None:
    """Sum over prefixes with the same future; one stands for all of them."""
    table = scratch.slot_table
    for at in range(len(table)):
        table[at] = -1
    mask = len(table) - 1
    n_kept = 0
    for slot in range(state.counts[N_SLOTS]):
        node = state.slot_node[slot]
        place = state.place[node]
        other = -1
        if place >= 0:
            at = place * 40_503 + state.token[node] * 911 + state.lm_state[node, 0] * 7_919
            at = (at ^ (at >> 9)) & mask
            other = table[at]
            while other >= 0 and not _has_same_future(state, state.slot_node[other], node):
                at = (at + 1) & mask
                other = table[at]
            if other < 0:
                table[at] = n_kept
        if other < 0:
            state.slot_node[n_kept] = node
            state.slot_of[node] = n_kept
            state.blank_mass[n_kept] = state.blank_mass[slot]
            state.token_mass[n_kept] = state.token_mass[slot]
            n_kept += 1
            continue
        mass = state.blank_mass[slot] + state.token_mass[slot]
        other_mass = state.blank_mass[other] + state.token_mass[other]
        rival = state.slot_node[other]
        state.slot_of[node] = -1
        if mass > other_mass and state.winner[node] < 0:
            state.slot_of[rival] = -1
            state.slot_node[other] = node
            state.slot_of[node] = other
            _link(state, node, rival, other_mass / (mass + other_mass))
        else:
            _link(state, rival, node, mass / (mass + other_mass))
        state.blank_mass[other] += state.blank_mass[slot]
        state.token_mass[other] += state.token_mass[slot]
    state.counts[N_SLOTS] = n_kept


@compiled
def _has_same_future(state: SearchState, one: int, other: int) -> bool:
    """Whether what follows two prefixes is weighed the same; they have as many words, too.

    Equal numbers of words keep the ways through rivals and parents free of circles.
    """
    if (
        state.place[one] != state.place[other]
        or state.token[one] != state.token[other]
        or state.phrase[one] != state.phrase[other]
        or state.n_words[one] != state.n_words[other]
    ):
        return False
    for length in range(state.lm_state.shape[1]):
        if state.lm_state[one, length] != state.lm_state[other, length]:
            return False
    return True


@compiled
def _link(state: SearchState, winner: int, rival: int, share: float) -> None:
    """Make the winner stand for its rival, which has this share of their mass."""
    top = rival
    while state.winner[top] >= 0 and state.winner[top] != winner:
        top = state.winner[top]
    if state.winner[top] < 0 and (share < _LEAST_SHARE or _stands_for(state, top, winner)):
        return
    _scale_shares(state, winner, 1.0 - share)
    if state.winner[top] < 0:
        state.winner[top] = winner
        state.next_rival[top] = state.first_rival[winner]
        state.first_rival[winner] = top
        state.share[top] = share
    else:
        state.share[top] += share


@compiled
def _stands_for(state: SearchState, one: int, other: int) -> bool:
    """Whether a node is another one, or its winner, or its winner's, and so on."""
    while other >= 0 and other != one:
        other = state.winner[other]
    return other == one


@compiled
def _make_node(knowledge: Knowledge, state: SearchState, scratch: Scratch, i: int) -> int:
    """Add the node of a candidate to the tree."""
    settings = knowledge.settings
    parent = state.slot_node[scratch.slot[i]]
    token, word = scratch.token[i], scratch.word[i]
    state.counts[N_FREE] -= 1
    node = state.free[state.counts[N_FREE]]
    state.parent[node] = parent
    state.first_child[node] = -1
    state.next_sibling[node] = state.first_child[parent]
    state.first_child[parent] = node
    state.token[node] = token
    state.word[node] = word
    state.place[node] = scratch.place[i]
    state.phrase[node] = scratch.phrase[i]
    state.factor[node] = scratch.factor[i]
    state.look[node] = scratch.look[i]
    if word == NO_WORD or not settings.has_lm:
        for length in range(state.lm_state.shape[1]):
            state.lm_state[node, length] = state.lm_state[parent, length]
    else:
        known = word if word < settings.n_lm_words else settings.unknown_word
        score_word(knowledge.lm, state.lm_state[parent], known, state.lm_state[node])
    state.n_words[node] = state.n_words[parent] + (word != NO_WORD)
    state.own_share[node] = 1.0
    state.winner[node] = -1
    state.first_rival[node] = -1
    return node


@compiled
def sweep(state: SearchState) -> None:
    """Free the nodes that no prefix of the beam came by."""
    n_nodes = len(state.parent)
    for node in range(n_nodes):
        state.first_child[node] = _UNUSED
    for slot in range(state.counts[N_SLOTS]):
        _mark(state, state.slot_node[slot])
    n_free = 0
    for node in range(n_nodes - 1, -1, -1):
        if state.first_child[node] == _UNUSED:
            state.free[n_free] = node
            n_free += 1
            continue
        parent = state.parent[node]
        if parent >= 0:
            state.next_sibling[node] = state.first_child[parent]
            state.first_child[parent] = node
        if state.winner[node] >= 0 and state.first_child[state.winner[node]] == _UNUSED:
            state.winner[node] = -1
    state.counts[N_FREE] = n_free


@compiled
def _mark(state: SearchState, node: int) -> None:
    """Mark all nodes on the ways to a node, its own and its rivals'."""
    stack = state.free  # it is filled anew after marking
    stack[0] = node
    n_waiting = 1
    while n_waiting > 0:
        n_waiting -= 1
        node = stack[n_waiting]
        if node < 0 or state.first_child[node] != _UNUSED:
            continue
        state.first_child[node] = -1
        parent = state.parent[node]
        if parent >= 0 and state.first_child[parent] == _UNUSED:
            stack[n_waiting] = parent
            n_waiting += 1
        rival = state.first_rival[node]
        while rival >= 0:
            if state.first_child[rival] == _UNUSED:
                stack[n_waiting] = rival
                n_waiting += 1
            rival = state.next_rival[rival]


@compiled
def halve(state: SearchState, scratch: Scratch) -> None:
    """Drop the weaker half of the beam."""
    n_slots = state.counts[N_SLOTS]
    for slot in range(n_slots):
        scratch.scores[slot] = state.blank_mass[slot] + state.token_mass[slot]
    least = kth_largest(scratch.scores, n_slots, n_slots // 2)
    n_kept = 0
    for slot in range(n_slots):
        node = state.slot_node[slot]
        state.slot_of[node] = -1
        if state.blank_mass[slot] + state.token_mass[slot] >= least and n_kept < n_slots // 2:
            state.slot_node[n_kept] = node
            state.slot_of[node] = n_kept
            state.blank_mass[n_kept] = state.blank_mass[slot]
            state.token_mass[n_kept] = state.token_mass[slot]
            n_kept += 1
    state.counts[N_SLOTS] = n_kept
    sweep(state)


@allocating
def shared_way(state: SearchState) -> LongArray:
    """The nodes that all prefixes of the beam have in common, up to the last end of a word.

    Returns:
        From the root on, int64; the root alone where no word is shared.
    """
    n_slots = state.counts[N_SLOTS]
    n_passing = np.zeros(len(state.parent), np.int64)
    for slot in range(n_slots):
        node = state.slot_node[slot]
        while node >= 0:
            n_passing[node] += 1
            node = state.parent[node]
    shared = np.int64(state.slot_node[0])
    while state.parent[shared] >= 0 and (
        n_passing[shared] < n_slots or state.word[shared] == NO_WORD
    ):
        shared = np.int64(state.parent[shared])
    nodes = [shared]
    while state.parent[shared] >= 0:
        shared = np.int64(state.parent[shared])
        nodes.append(shared)
    return np.array(nodes[::-1])


@compiled
def cut(state: SearchState, root: int) -> None:
    """Forget what lies before a node that all prefixes descend from.

    Readings that differ in what is forgotten are given up.
    """
    state.parent[root] = -1
    state.first_rival[root] = -1
    state.own_share[root] = 1.0
    for slot in range(state.counts[N_SLOTS]):
        node = state.slot_node[slot]
        while node >= 0:
            _drop_strangers(state, node, root)
            node = state.parent[node]
    sweep(state)


@compiled
def _drop_strangers(state: SearchState, node: int, root: int) -> None:
    """Unlink the rivals of a node that do not descend from the root, or have rivals themselves."""
    rival = state.first_rival[node]
    state.first_rival[node] = -1
    while rival >= 0:
        following = state.next_rival[rival]
        ancestor = rival
        is_simple = True
        while ancestor >= 0 and ancestor != root:
            is_simple = is_simple and state.first_rival[ancestor] < 0
            ancestor = state.parent[ancestor]
        if ancestor == root and is_simple:
            state.next_rival[rival] = state.first_rival[node]
            state.first_rival[node] = rival
        else:
            state.winner[rival] = -1
        rival = following
