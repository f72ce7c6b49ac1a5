"""What a search has found: readings, their words, and how much of the beam agrees with them.

The beam is a lattice: a prefix stands for its rivals, which had the same future, and knows each
one's share of the mass. A way from the root to a prefix goes by its own edges or by its rivals'.
"""

from __future__ import annotations

import heapq
import math
from typing import Final, NamedTuple

import numpy as np

from service.decoding.compiled import allocating, compiled, inlined
from service.decoding.ngram import score_word
from service.decoding.phrases import DEAD, completes, follow
from service.decoding.search import (
    N_SLOTS,
    NO_WORD,
    DoubleArray,
    Knowledge,
    LongArray,
    SearchState,
    spelled_word,
    word_gain,
)

_HASH_MULTIPLIER: Final = 0x5851F42D4C957F2D
_LEAST_POSTERIOR: Final = 1e-4
_ROUNDING: Final = 1e9  # beyond these parts of a log score is rounding
TINY: Final = 1e-300
"""Least share, so that its logarithm is finite."""


class Readings(NamedTuple):
    """The beam as if the audio ended here, best first.

    `m` is the number of readings.
    """

    node: LongArray
    """Node of each reading, int64, (m,)."""
    word: LongArray
    """The word that ends with it, `NO_WORD` where its last word has ended before, int64, (m,)."""
    log_mass: DoubleArray
    """Of all ways to the node, with the end of the word and of the sentence, float64, (m,)."""
    log_share: DoubleArray
    """Log share of the best way to each node of the tree, float64, (n,); NaN if not needed."""
    order: LongArray
    """The nodes that any reading comes by, each behind those before it on a way, int64."""


@allocating
def read_beam(knowledge: Knowledge, state: SearchState, is_end: bool) -> Readings:
    """End the running word of every prefix, and the sentence if `is_end`; the state stays."""
    found = _end_words_of_beam(knowledge, state, is_end, False)
    if len(found[0]) == 0:  # all are within words that cannot end: leave these out
        found = _end_words_of_beam(knowledge, state, is_end, True)
    nodes, words, masses = found
    log_share = np.full(len(state.parent), np.nan)
    log_mass = np.empty(len(nodes))
    reached = [np.int64(0) for _ in range(0)]
    for i in range(len(nodes)):
        _find_best_share(state, nodes[i], log_share, reached)
        log_mass[i] = math.log(masses[i]) + state.log_scale[0] if masses[i] > 0.0 else -np.inf
    by_score = np.empty(len(nodes))
    for i in range(len(nodes)):
        by_score[i] = -(log_mass[i] + log_share[nodes[i]])
    order = np.argsort(by_score, kind="mergesort")
    return Readings(nodes[order], words[order], log_mass[order], log_share, np.array(reached))


@allocating
def _find_best_share(
    state: SearchState, node: int, log_share: DoubleArray, reached: list[np.int64]
) -> None:
    """Fill in the share of the best way to a node and to all it comes by."""
    stack = [np.int64(node)]
    while len(stack) > 0:
        node = stack[-1]
        if not math.isnan(log_share[node]):
            stack.pop()
            continue
        parent = state.parent[node]
        is_ready = True
        if parent >= 0 and math.isnan(log_share[parent]):
            stack.append(np.int64(parent))
            is_ready = False
        rival = state.first_rival[node]
        while rival >= 0:
            if math.isnan(log_share[rival]):
                stack.append(np.int64(rival))
                is_ready = False
            rival = state.next_rival[rival]
        if not is_ready:
            continue
        stack.pop()
        best = 0.0
        if parent >= 0:
            best = math.log(state.own_share[node]) + log_share[parent]
        rival = state.first_rival[node]
        while rival >= 0:
            best = max(best, math.log(state.share[rival]) + log_share[rival])
            rival = state.next_rival[rival]
        log_share[node] = best
        reached.append(np.int64(node))


@allocating
def _end_words_of_beam(
    knowledge: Knowledge, state: SearchState, is_end: bool, leaves_out: bool
) -> tuple[LongArray, LongArray, DoubleArray]:
    settings, trie, phrases = knowledge.settings, knowledge.trie, knowledge.phrases
    nodes = [np.int64(0) for _ in range(0)]
    words = [np.int64(0) for _ in range(0)]
    for slot in range(state.counts[N_SLOTS]):
        node = np.int64(state.slot_node[slot])
        place, phrase = state.place[node], state.phrase[node]
        if leaves_out or place == 0:
            nodes.append(node)
            words.append(np.int64(NO_WORD))
        elif settings.boundary >= 0:
            word = spelled_word(knowledge, place, phrase)
            if word != NO_WORD:
                nodes.append(node)
                words.append(np.int64(word))
        else:
            n_before = len(nodes)
            if place > 0:
                for i in range(trie.word_start[place], trie.word_start[place + 1]):
                    nodes.append(node)
                    words.append(np.int64(trie.words[i]))
            while phrase > DEAD:
                for child in range(phrases.child_start[phrase], phrases.child_start[phrase + 1]):
                    word = phrases.symbol[child] - settings.n_tokens
                    if word >= settings.n_lm_words:
                        nodes.append(node)
                        words.append(np.int64(word))
                phrase = phrases.fail[phrase]
            if settings.open_vocabulary and len(nodes) == n_before:
                nodes.append(node)
                words.append(np.int64(settings.unknown_word))
    masses = np.empty(len(nodes))
    for i in range(len(nodes)):
        slot = state.slot_of[nodes[i]]
        masses[i] = state.blank_mass[slot] + state.token_mass[slot]
        masses[i] *= _end_gain(knowledge, state, nodes[i], words[i], is_end)
    if settings.boundary >= 0:  # a text and the same with a boundary behind it are one reading
        at = np.full(len(state.parent), -1)
        for i in range(len(nodes)):
            at[nodes[i]] = i
        for i in range(len(nodes)):
            parent = state.parent[nodes[i]]
            if words[i] == NO_WORD and parent >= 0 and at[parent] >= 0:
                masses[at[parent]] += masses[i]
                masses[i] = 0.0
    return np.array(nodes), np.array(words), masses


@allocating
def _end_gain(
    knowledge: Knowledge, state: SearchState, node: int, word: int, is_end: bool
) -> float:
    """What the end of the running word, and of the sentence, multiplies the mass by."""
    settings, phrases = knowledge.settings, knowledge.phrases
    following = np.empty(state.lm_state.shape[1], np.int32)
    following[:] = state.lm_state[node]
    phrase = state.phrase[node]
    gain = 1.0 / (state.look[node] * phrases.credit[phrase])
    if word != NO_WORD:
        symbol = settings.boundary if settings.boundary >= 0 else settings.n_tokens + word
        gain *= word_gain(knowledge, state, node, word, following)
        gain *= phrases.reward[follow(phrases, phrase, symbol, True)]
        if word == settings.unknown_word and not completes(phrases, phrase, symbol):
            gain *= settings.unknown_share
        if settings.has_lm:
            known = word if word < settings.n_lm_words else settings.unknown_word
            score_word(knowledge.lm, state.lm_state[node], known, following)
    if is_end and settings.has_lm:
        unused = np.empty_like(following)
        score = score_word(knowledge.lm, following, settings.end_word, unused)
        gain *= math.exp(settings.lm_weight * score)
    return gain


class Words(NamedTuple):
    """Words of a reading, one entry each; frames count from the start of the search."""

    word: LongArray
    first_frame: LongArray
    last_frame: LongArray
    share: DoubleArray
    """Of all readings, those that have the same word at the same time, float64, 0 to 1."""
    lowest_peak: DoubleArray
    """Lowest log probability of a token, natural log."""
    mean_entropy: DoubleArray
    highest_entropy: DoubleArray
    n_tokens: LongArray
    token: LongArray
    """The tokens of all words one after another, without what is between words."""


@allocating
def read_best(knowledge: Knowledge, state: SearchState, is_end: bool) -> tuple[Words, float]:
    """The words of the best reading and its log score; see `read_beam`."""
    beam = read_beam(knowledge, state, is_end)
    nodes, last_word, score = best_way(state, beam)
    occurrences = find_occurrences(knowledge, state, beam)
    return words_on(knowledge, state, occurrences, nodes, last_word), score


@allocating
def best_way(state: SearchState, beam: Readings) -> tuple[LongArray, int, float]:
    """The best way through the lattice: nodes from the root, last word, log score."""
    nodes = [beam.node[0]]
    score = beam.log_mass[0]
    node = beam.node[0]
    while True:
        parent = np.int64(state.parent[node])
        next_node, factor, best = np.int64(-1), 1.0, -np.inf
        if parent >= 0:
            factor = max(state.own_share[node], TINY)
            next_node, best = parent, math.log(factor) + beam.log_share[parent]
        rival = np.int64(state.first_rival[node])
        while rival >= 0:
            share = max(state.share[rival], TINY)
            if math.log(share) + beam.log_share[rival] > best:
                next_node, factor = rival, share
                best = math.log(share) + beam.log_share[rival]
            rival = np.int64(state.next_rival[rival])
        if next_node < 0:
            return np.array(nodes)[::-1].copy(), beam.word[0], score
        if next_node == parent:
            nodes.append(parent)
        else:
            nodes[-1] = next_node  # it stands where its winner stood
        score += math.log(factor)
        node = next_node


class Ways(NamedTuple):
    """Ways through the lattice, best first; one entry each, but for `nodes`."""

    nodes: LongArray
    """Of all ways, one after another, each from the root on, int64."""
    end: LongArray
    """Place in `nodes` behind the way, int64."""
    last_word: LongArray
    """The word that ends with it, or `NO_WORD`, int64."""
    score: DoubleArray
    """Log score, float64."""


@allocating
def best_ways(knowledge: Knowledge, state: SearchState, beam: Readings, n: int, most: int) -> Ways:
    """The best ways through the lattice that differ in their words.

    Of ways that are alike, but for rounding, the one that was begun last goes on: where there are
    many, trying each a little would take forever.

    Args:
        knowledge: what was searched for.
        state: the search.
        beam: where ways end.
        n: how many are wanted.
        most: how many are tried.
    """
    heap = [(0.0, 0, np.int64(0), 0.0, np.int64(0), 0) for _ in range(0)]
    for i in range(len(beam.node)):
        cost = _cost(beam.log_mass[i] + beam.log_share[beam.node[i]])
        heap.append((cost, -i, beam.node[i], beam.log_mass[i], beam.word[i], -1))
    heapq.heapify(heap)
    n_begun = len(heap)
    # what follows the beginning of a way: a node, and the place here of what follows that
    followers = [(np.int64(0), 0) for _ in range(0)]
    seen = {np.int64(0)}  # a text's key is another number
    nodes = [np.int64(0) for _ in range(0)]
    ends = [np.int64(0) for _ in range(0)]
    words = [np.int64(0) for _ in range(0)]
    scores = [0.0 for _ in range(0)]
    n_tried = 0
    while len(heap) > 0 and len(ends) < n and n_tried < most:
        _, _, node, mass, word, behind = heapq.heappop(heap)
        while node >= 0:
            rival = np.int64(state.first_rival[node])
            while rival >= 0:
                through = mass + math.log(max(state.share[rival], TINY))
                cost = _cost(through + beam.log_share[rival])
                heapq.heappush(heap, (cost, -n_begun, rival, through, word, behind))
                n_begun += 1
                rival = np.int64(state.next_rival[rival])
            parent = np.int64(state.parent[node])
            followers.append((node, behind))
            behind = len(followers) - 1
            if parent >= 0:
                mass += math.log(max(state.own_share[node], TINY))
                cost = _cost(mass + beam.log_share[parent])
                if len(heap) > 0 and cost > heap[0][0]:
                    heapq.heappush(heap, (cost, -n_begun, parent, mass, word, behind))
                    n_begun += 1
                    break
            node = parent
        if node >= 0:
            continue  # another one is better so far
        n_tried += 1
        way = [np.int64(0) for _ in range(0)]
        while behind >= 0:
            way.append(followers[behind][0])
            behind = followers[behind][1]
        key = _text_key(knowledge, state, np.array(way), word)
        if key not in seen:
            seen.add(key)
            nodes.extend(way)
            ends.append(np.int64(len(nodes)))
            words.append(word)
            scores.append(mass)
    return Ways(np.array(nodes), np.array(ends), np.array(words), np.array(scores))


@inlined
def _cost(log_score: float) -> float:
    return -np.floor(log_score * _ROUNDING + 0.5)


@allocating
def _text_key(knowledge: Knowledge, state: SearchState, nodes: LongArray, last_word: int) -> int:
    """A number that ways share if their words are the same."""
    spans = _spans_on(knowledge, state, nodes, last_word)
    key = np.int64(1)
    for i in range(len(spans.word)):
        key = (key ^ spans.word[i]) * np.int64(_HASH_MULTIPLIER)
        if spans.word[i] == knowledge.settings.unknown_word:  # it is what it is spelled by
            for node in nodes[spans.begin[i] : spans.end[i]]:
                key = (key ^ state.token[node]) * np.int64(_HASH_MULTIPLIER)
        key ^= key >> 29
    return key


@allocating
def words_on(
    knowledge: Knowledge,
    state: SearchState,
    occurrences: Occurrences,
    nodes: LongArray,
    last_word: int,
) -> Words:
    """The words on a way.

    Args:
        knowledge: what was searched for.
        state: the search.
        occurrences: the words of all its readings.
        nodes: the way, the root first, int64.
        last_word: the word that ends with it, or `NO_WORD`.
    """
    spans = _spans_on(knowledge, state, nodes, last_word)
    first_frame, last_frame = _token_frames(state, nodes)
    n_words = len(spans.word)
    n_tokens = spans.end - spans.begin
    lowest_peak = np.empty(n_words)
    mean_entropy = np.empty(n_words)
    highest_entropy = np.empty(n_words)
    tokens = np.empty(n_tokens.sum(), np.int64)
    n_before = 0
    for i in range(n_words):
        peak, total, highest = np.inf, 0.0, -np.inf
        for node in nodes[spans.begin[i] : spans.end[i]]:
            peak = min(peak, state.peak[node])
            total += state.entropy[node]
            highest = max(highest, state.entropy[node])
            tokens[n_before] = state.token[node]
            n_before += 1
        lowest_peak[i], mean_entropy[i], highest_entropy[i] = peak, total / n_tokens[i], highest
    return Words(
        spans.word,
        first_frame[spans.begin],
        last_frame[spans.end - 1],
        _posteriors(knowledge, state, occurrences, spans),
        lowest_peak,
        mean_entropy,
        highest_entropy,
        n_tokens,
        tokens,
    )


class _Spans(NamedTuple):
    """Where words are on a way, one entry each."""

    word: LongArray
    begin: LongArray
    """Place of the first token on the way, int64."""
    end: LongArray
    """Place behind the last token, int64."""
    first: LongArray
    """Node of the first token, int64."""
    last: LongArray
    """Node of the last token, int64."""


@allocating
def _spans_on(knowledge: Knowledge, state: SearchState, nodes: LongArray, last_word: int) -> _Spans:
    words = [np.int64(0) for _ in range(0)]
    begins = [np.int64(0) for _ in range(0)]
    ends = [np.int64(0) for _ in range(0)]
    has_boundary = knowledge.settings.boundary >= 0
    begin = 1 if has_boundary or state.token[nodes[0]] < 0 else 0
    for i in range(1, len(nodes)):
        if state.word[nodes[i]] != NO_WORD:
            words.append(np.int64(state.word[nodes[i]]))
            begins.append(np.int64(begin))
            ends.append(np.int64(i))
            begin = i + 1 if has_boundary else i
    if last_word != NO_WORD:
        words.append(np.int64(last_word))
        begins.append(np.int64(begin))
        ends.append(np.int64(len(nodes)))
    begin_places, end_places = np.array(begins), np.array(ends)
    return _Spans(
        np.array(words), begin_places, end_places, nodes[begin_places], nodes[end_places - 1]
    )


class Occurrences(NamedTuple):
    """Every word of every reading, wherever it stands; one entry each."""

    key: LongArray
    """What tells the word from others, int64."""
    begin: LongArray
    """First frame of its first token, int64."""
    end: LongArray
    """Last frame of its last token, int64."""
    mass: DoubleArray
    """Share of all readings that have it there, float64, 0 to 1."""


@allocating
def find_occurrences(knowledge: Knowledge, state: SearchState, beam: Readings) -> Occurrences:
    """The words of all readings of a beam."""
    words = [np.int64(0) for _ in range(0)]
    lasts = [np.int64(0) for _ in range(0)]
    shares = [0.0 for _ in range(0)]
    mass = np.exp(beam.log_mass - beam.log_mass.max())
    mass /= mass.sum()
    passing = np.zeros(len(state.parent))
    for i in range(len(beam.node)):
        passing[beam.node[i]] += mass[i]
        if beam.word[i] != NO_WORD and mass[i] > 0.0:
            words.append(beam.word[i])
            lasts.append(beam.node[i])
            shares.append(mass[i])
    for i in range(len(beam.order) - 1, -1, -1):
        node = beam.order[i]
        rival = state.first_rival[node]
        while rival >= 0:
            passing[rival] += passing[node] * state.share[rival]
            rival = state.next_rival[rival]
        parent = state.parent[node]
        own = passing[node] * state.own_share[node]
        if parent >= 0:
            passing[parent] += own
            if state.word[node] != NO_WORD and own > _LEAST_POSTERIOR:
                words.append(np.int64(state.word[node]))
                lasts.append(np.int64(parent))
                shares.append(own)
    n_found = len(words)
    key = np.empty(n_found, np.int64)
    begin = np.empty(n_found, np.int64)
    end = np.empty(n_found, np.int64)
    for i in range(n_found):
        key[i], first = _key(knowledge, state, words[i], lasts[i])
        begin[i], end[i] = state.first_frame[first], state.last_frame[lasts[i]]
    return Occurrences(key, begin, end, np.array(shares))


@allocating
def _posteriors(
    knowledge: Knowledge, state: SearchState, occurrences: Occurrences, spans: _Spans
) -> DoubleArray:
    """Share of all readings that have the same word at the same time, float64, (words,)."""
    n_words = len(spans.word)
    found = np.zeros(n_words)
    for i in range(n_words):
        key = _key(knowledge, state, spans.word[i], spans.last[i])[0]
        begin, end = state.first_frame[spans.first[i]], state.last_frame[spans.last[i]]
        for j in range(len(occurrences.key)):
            if (
                occurrences.key[j] == key
                and occurrences.end[j] >= begin
                and occurrences.begin[j] <= end
            ):
                found[i] += occurrences.mass[j]
    return np.minimum(found, 1.0)


@compiled
def _key(knowledge: Knowledge, state: SearchState, word: int, last: int) -> tuple[int, int]:
    """What tells a word from others, and the node of its first token."""
    settings = knowledge.settings
    key = word + 1
    node = last
    while True:
        if word == settings.unknown_word:
            key = key * _HASH_MULTIPLIER + state.token[node]
        parent = state.parent[node]
        if parent < 0 or (settings.boundary < 0 and state.word[node] != NO_WORD):
            return key, node
        if settings.boundary >= 0 and state.token[parent] == settings.boundary:
            return key, node
        if state.parent[parent] < 0 and state.token[parent] < 0:
            return key, node
        node = parent


@allocating
def _token_frames(state: SearchState, nodes: LongArray) -> tuple[LongArray, LongArray]:
    """First and last frame of each token of a way, in order of time, int64, (nodes,)."""
    n_nodes = len(nodes)
    first = np.empty(n_nodes, np.int64)
    last = np.empty(n_nodes, np.int64)
    earliest = np.int64(1) << 40
    for i in range(n_nodes - 1, -1, -1):
        node = nodes[i]
        first[i] = min(state.first_frame[node], earliest)
        last[i] = max(first[i], min(state.last_frame[node], earliest - 1))
        earliest = first[i]
    return first, last
