"""Where one sync ends and the next begins, for trainers that open no bracket.

A *pass* is what one trainer sends of one policy, each name at most once. Shards of two passes
must never meet in one layer: an old q with a new k is a mixture that no error would show. A pass
that no call begins or ends begins with the push in which

    1  a name comes again that has come in this pass already, be it live or waiting
    2  a name comes again that was refused in this pass, after others have come since
       (right after it was refused, it is sent once more: the same pass; and what was refused
       before a pass begins as the last one did, was of an attempt that was given up)
    3  the name comes that the last passes began with, though this one began with another, and
       has brought a stretch of what they held in a row: a trainer went away, and another begins
       as they did
    4  a name comes again that was there before a guess by 3, out of the order which it was guessed
       by: the guess was wrong, and is not made again

and everything of the earlier pass that still waits is dropped. A bracket, a
`process_weights_after_loading` and a sleep say by themselves that a pass is over. A push belongs
to one pass as a whole.

Stacks          what they do                                      what shows a new pass
TRL, OpenRLHF   one tensor a call, the whole model, one order     1, with the first tensor
AReaL           the same, and goes on after a refusal             1, 2
verl, NeMo-RL,  buckets, then process_weights_after_loading       the call; 1 after a trainer
checkpoint-e.,                                                    that did not come so far
ms-swift
SkyRL, vLLM     brackets                                          the bracket
a trainer that died in a fused layer, and another that begins anew: 1; 3 if it left before
                it had sent anything that the new one begins with

Names that are never sent (frozen) show nothing. Tied names are two names, each
sent once or not at all.

What cannot be told: two trainers, the first of which died, that send no name twice, are one
trainer to the engine. If both send part of one layer and go on, the second one's own pass brings
the first one's names again (1), and the layer is left waiting for the rest: `status().pending`
names it. So after a whole pass, each layer is of that pass alone, or waits and is named. The next
pass puts it right, if the second one goes on otherwise than the first one did (`_look_back`).
One case stays unseen for one pass: the first one left a shard (k) that the second one never
sends, and no name had come twice when the second one's q completed the layer.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet


class Passes:
    """Tells one pass from the next by the names that are pushed."""

    def __init__(self) -> None:
        self._seen: dict[str, None] = {}  # in this pass, in order
        self._refused: set[str] = set()  # in this pass, and no other name has come since
        self._early: set[str] = set()  # refused, and would have begun the next pass
        self._first: str | None = None  # of this pass
        self._before: str | None = None  # the first name of the pass before
        self._usual: dict[str, int] = {}  # places in a pass, of which two in a row began alike
        self._left: set[str] = set()  # what a trainer has left behind, by rule 3
        self._last: list[str] = []  # the pass before, as long as this one is like it
        self._alike = 0  # names at the beginning of both
        self._push: list[str] = []  # names of the push under way
        self._shown_by = 0  # the rule by which a new pass begins with it

    def start(self) -> None:
        """A push begins."""
        self._push, self._shown_by = [], 0

    def begins_with(self, name: str) -> bool:
        """A tensor of the push under way: whether it is the first to show that a pass begins."""
        self._push.append(name)
        if self._shown_by:
            return False
        if name in self._seen:
            self._shown_by = 1
        elif self._is_usual_beginning(name):
            self._shown_by = 3
        elif name in self._left and self._is_out_of_order(name):
            self._shown_by = 4
        return self._shown_by > 0

    def note_taken(self, names: AbstractSet[str]) -> None:
        """The push under way is committed.

        Args:
            names: all of its names.

        """
        if self._shown_by:
            self._begin_anew()
        if self._first is None and self._push:
            self._first = self._push[0]
        if not names <= self._refused:
            self._seen |= dict.fromkeys(self._refused)
            self._refused.clear()
        self._refused -= names
        for name in self._push:
            self._look_back(name)
            self._seen[name] = None
        self.start()

    def note_refused(self, names: AbstractSet[str]) -> None:
        """The push under way was rolled back."""
        if self._shown_by:
            self._early |= names
        else:
            self._refused |= names
        self.start()

    def close(self) -> None:
        """The pass is over."""
        if self._first is not None:
            cut_short = self._usual.get(self._first) == 0 and self._seen.keys() < self._usual.keys()
            if self._first == self._before and not cut_short:
                self._usual = {name: place for place, name in enumerate(self._seen)}
            self._before = self._first
        self._forget()

    def close_for_good(self) -> None:
        """The trainer itself says when its passes end: how they begin need not be guessed."""
        self._forget()
        self._before, self._usual = None, {}

    def _begin_anew(self) -> None:
        # What was refused where a pass would have begun is of the one that begins now, unless that
        # begins as the last one did: then it was an attempt that its trainer has given up.
        early = set() if self._push[0] == self._first else self._early.copy()
        last = list(self._seen)
        if self._shown_by == 3:
            self._forget()  # what was left says nothing of how passes begin
            self._left = set(last)
        else:
            self.close()
            self._last = last
        if self._shown_by == 4:
            self._usual = {}
        self._refused = early

    def _look_back(self, name: str) -> None:
        """A pass began as the last one did. If it goes on otherwise, with a name that is new, that
        one was two: what a stranger had left, and the beginning of this one, which is kept."""
        last, place = self._last, self._alike
        if not last:
            return
        if place < len(last) and name == last[place]:
            self._alike += 1
            return
        self._last = []
        if 0 < place < len(last) and name not in last:
            self._seen = dict.fromkeys([*last[place:], *self._seen])
            self._first = last[place]

    def _forget(self) -> None:
        self._seen = {}
        self._refused, self._early, self._left = set(), set(), set()
        self._first, self._last, self._alike = None, [], 0

    def _is_usual_beginning(self, name: str) -> bool:
        return (
            self._first is not None and self._usual.get(name) == 0 and self._is_a_stretch_of_usual()
        )

    def _is_a_stretch_of_usual(self) -> bool:
        """Whether what has come in this pass is what usually comes in a row.

        Of a trainer that is gone, it is. A trainer that sends in another order every time has a
        beginning in the middle of a pass, too, but hardly ever after such a stretch.
        """
        places = [self._usual.get(seen, -1) for seen in self._seen]
        return -1 not in places and places == list(range(places[0], places[0] + len(places)))

    def _is_out_of_order(self, name: str) -> bool:
        place = self._usual.get(name, 0)
        return any(self._usual.get(seen, place) > place for seen in self._seen)
