"""python -m serving chat: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx

from serving.client.ask import EFFORTS, add_flags, connected, request
from serving.client.connection import KEY_VARIABLE, RefusedError, base_url, chunks, only_model, silence
from serving.client.terminal import Answer, print_stream, styled

HELP = """/language LANGUAGE   think in this language from now on, such as fr or French; without one, as the model likes
/effort EFFORT       low, medium or high
/reset               forget the conversation
/save FILE           write the conversation to a new file, a line of JSON as training takes it
/help                this
/quit                leave; so does the end of the input
Ctrl-C stops a running answer, and leaves when none is running."""


def parser() -> argparse.ArgumentParser:
    """The flags of the verb."""
    found = argparse.ArgumentParser(
        prog="python -m serving chat",
        description="Holds a conversation with an endpoint: what was said is kept, what was thought is not fed back. "
        f"In a pipe each line is a turn. An API key is taken from {KEY_VARIABLE}. Commands:\n\n{HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(found)
    return found


def main(arguments: Sequence[str]) -> int:
    """Runs the verb; returns its exit status: 1 when the endpoint does not answer, or a turn in a pipe failed."""
    flags, http = connected(parser(), arguments)
    with http:
        try:
            chat = Chat(http, flags, flags.model or only_model(http))
        except httpx.TransportError as error:
            print(silence(base_url(flags.url), error), file=sys.stderr)
            return 1
        except RefusedError as error:
            print(error, file=sys.stderr)
            return 1
        return chat.run()


class Chat:
    """A conversation, and the wishes that go with its next turn.

    Args:
        flags: of `python -m serving chat`.
        model: that is asked.
    """

    def __init__(self, http: httpx.Client, flags: argparse.Namespace, model: str) -> None:
        self.http = http
        self.flags = flags
        self.model = model
        self.interactive = sys.stdin.isatty()
        self.messages: list[dict[str, Any]] = []
        self.thoughts: list[str] = []
        """of each answer: for `/save`, never sent"""
        self.failed = False
        self._reset()

    def run(self) -> int:
        """Turns and commands until the input ends, `/quit`, or Ctrl-C while nothing runs."""
        if self.interactive:
            print(styled("note", f"{self.model} at {self.http.base_url}; /help lists the commands"))
        for line in self._lines():
            if line == "/quit":
                break
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._turn(line)
        return 1 if self.failed and not self.interactive else 0

    def _lines(self) -> Iterator[str]:
        if not self.interactive:
            for line in sys.stdin:
                yield line.strip()
            return
        import readline  # noqa: F401  (editing and history for input())

        while True:
            try:
                yield input("\n> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return

    def _turn(self, text: str) -> None:
        """Asks, and keeps question and answer. A turn that failed is forgotten; of one that was stopped, what came."""
        answer = Answer()
        asked = [*self.messages, {"role": "user", "content": text}]
        fields = request(self.flags, self.model)
        try:
            with closing(chunks(self.http, {**fields, "messages": asked})) as stream:
                print_stream(stream, answer)
        except KeyboardInterrupt:
            print(styled("note", "\n\n[stopped]"))
            if not self.interactive:
                raise
            if not answer.content:
                return
        except (RefusedError, httpx.TransportError) as error:
            sentence = silence(str(self.http.base_url), error) if isinstance(error, httpx.TransportError) else error
            print(("\n" if answer.content or answer.reasoning else "") + str(sentence), file=sys.stderr)
            self.failed = True
            return
        self.messages = [*asked, {"role": "assistant", "content": answer.content}]
        self.thoughts.append(answer.reasoning)

    def _command(self, line: str) -> None:
        name, _, value = line.partition(" ")
        value = value.strip()
        if name == "/language":
            self.flags.language = value or None
            self._say(f"thinking in {value}" if value else "thinking in the language that the model chooses")
        elif name == "/effort" and value in EFFORTS:
            self.flags.effort = value
            self._say(f"effort {value}")
        elif name == "/effort":
            self._refuse(f"/effort takes one of {', '.join(EFFORTS)}")
        elif name == "/reset":
            self._reset()
            self._say("the conversation is forgotten")
        elif name == "/save" and value:
            self._save(Path(value).expanduser())
        elif name == "/save":
            self._refuse("/save takes the name of a file")
        elif name == "/help":
            print(HELP)
        else:
            self._refuse(f"{name} is no command; /help lists them")

    def _reset(self) -> None:
        system = self.flags.system
        self.messages = [{"role": "system", "content": system}] if system else []
        self.thoughts = []

    def _save(self, path: Path) -> None:
        """One record of `messages`, thinking beside each answer: what `training` reads, and `serving batch`."""
        thoughts = iter(self.thoughts)
        messages = [
            {**message, "thinking": next(thoughts)} if message["role"] == "assistant" else message
            for message in self.messages
        ]
        record: dict[str, Any] = {"messages": messages}
        if self.flags.language:
            record["reasoning_language"] = self.flags.language
        if self.flags.effort:
            record["reasoning_effort"] = self.flags.effort
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        except FileExistsError:
            self._refuse(f"{path} is there already; name another file")
        except OSError as error:
            self._refuse(f"{path} cannot be written ({error.strerror})")
        else:
            self._say(f"{path} holds {len(messages)} messages")

    def _say(self, text: str) -> None:
        print(styled("note", text), flush=True)

    def _refuse(self, sentence: str) -> None:
        print(sentence, file=sys.stderr)
        self.failed = True
