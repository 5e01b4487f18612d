// A question and what came of it: text as it grows, how it ended, and the request for a shell.

import { call, events, Refusal } from "./endpoint.js";
import { findLanguage, languageOf, nameOf } from "./languages.js";
import { announce, badge, byId, copyText, tell } from "./page.js";

const OUTCOMES = {
  complete: "complete",
  tool_call: "ends with a tool call",
  truncated_in_analysis: "cut off while thinking",
  truncated_in_commentary: "cut off in the commentary",
  truncated_in_final: "cut off in the answer",
  truncated_in_tool_call: "cut off in a tool call",
  truncated_in_header: "cut off between two messages",
  malformed_header: "malformed header",
  unknown_channel: "unknown channel",
  no_final: "ended without an answer",
  empty: "nothing was written",
};
const SOUND_OUTCOMES = ["complete", "tool_call"];

const VERDICTS = {
  followed: (found, wish) => `thought in ${found}, as asked`,
  not_followed: (found, wish) => `thought in ${found}, asked for ${wish}`,
  undetermined: (found, wish) => `asked for ${wish}, too little text to tell`,
  not_requested: (found) => (found ? `thought in ${found}` : "too little thinking to tell its language"),
};

const UNDETERMINED = "und";
const FOLLOWS_WITHIN_PIXELS = 32;
const RIGHT_TO_LEFT = /[\p{Script=Arabic}\p{Script=Hebrew}]/u;
const LEFT_TO_RIGHT = /(?![\p{Script=Arabic}\p{Script=Hebrew}])\p{Letter}/u;

/** Text that grows, a paragraph for each line, in the direction of its language or of its own letters. */
class Pane {
  constructor(element) {
    this.element = element;
    this.text = "";
    this.pending = "";
    this.frame = 0;
  }

  append(text) {
    this.text += text;
    this.pending += text;
    this.frame ||= requestAnimationFrame(() => this.flush());
  }

  flush() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    if (!this.pending) return;
    const { element } = this;
    const follows = element.scrollHeight - element.scrollTop - element.clientHeight < FOLLOWS_WITHIN_PIXELS;
    const [first, ...further] = this.pending.split("\n");
    this.pending = "";
    if (element.lastChild) element.lastChild.firstChild.appendData(first);
    else this.#begin(first);
    further.forEach((line) => this.#begin(line));
    if (follows) element.scrollTop = element.scrollHeight;
  }

  #begin(line) {
    const paragraph = document.createElement("p");
    paragraph.dir = "auto";
    paragraph.append(document.createTextNode(line));
    this.element.append(paragraph);
  }

  /** The text is whole, and in this language; one of another script keeps its own direction. */
  declare(tag) {
    this.flush();
    const language = languageOf(tag);
    if (!language) {
      this.element.removeAttribute("lang");
      return;
    }
    this.element.lang = language.tag;
    this.element.dir = language.direction;
    const [own, other] = language.direction === "rtl" ? [RIGHT_TO_LEFT, LEFT_TO_RIGHT] : [LEFT_TO_RIGHT, RIGHT_TO_LEFT];
    for (const paragraph of this.element.children) {
      const foreign = other.test(paragraph.textContent) && !own.test(paragraph.textContent);
      if (!foreign) paragraph.removeAttribute("dir");
    }
  }
}

export class Turn {
  constructor(question, body) {
    this.question = question;
    this.body = body;
    this.abort = new AbortController();
    this.began = performance.now();
    this.firstSeconds = null;
    this.usage = null;
    this.ending = null;
    this.calls = [];
    this.element = byId("turn").content.firstElementChild.cloneNode(true);
    this.find(".question").textContent = question;
    const pane = (part) => new Pane(this.find(`[data-part=${part}]`));
    this.panes = { reasoning: pane("reasoning"), commentary: pane("commentary"), content: pane("content") };
    this.unparsed = pane("unparsed");
    const wished = findLanguage(body.reasoning_language ?? "");
    if (wished) this.panes.reasoning.element.lang = wished.tag;
    this.find(".copy").addEventListener("click", () => this.#copy());
    this.find(".as-curl").addEventListener("click", () => this.#showCurl());
    this.#state("waiting for the first token");
    byId("turns").append(this.element);
  }

  find(selector) {
    return this.element.querySelector(selector);
  }

  get answer() {
    return this.panes.content.text;
  }

  /** Asks, and shows what comes until the stream ends, breaks or is stopped; true if it ended well. */
  async run() {
    this.element.classList.add("running");
    this.panes.content.element.setAttribute("aria-busy", "true");
    try {
      const headers = { "Content-Type": "application/json" };
      const request = { method: "POST", headers, body: JSON.stringify(this.body), signal: this.abort.signal };
      const response = await call("v1/chat/completions", request);
      for await (const chunk of events(response.body)) this.#take(chunk);
      return true;
    } catch (error) {
      if (!this.abort.signal.aborted) this.#fail(error);
      return false;
    } finally {
      this.#settle();
    }
  }

  #take(chunk) {
    this.usage = chunk.usage ?? this.usage;
    for (const choice of chunk.choices ?? []) {
      const delta = choice.delta ?? {};
      for (const [part, pane] of Object.entries(this.panes)) {
        if (delta[part]) this.#write(part, pane, delta[part]);
      }
      for (const piece of delta.tool_calls ?? []) this.#writeCall(piece);
      if (choice.finish_reason) this.ending = choice;
    }
  }

  #write(part, pane, text) {
    this.#arrived();
    if (!pane.text) {
      this.#state({ reasoning: "thinking", commentary: "commenting", content: "answering" }[part]);
      this.#reveal(pane.element);
    }
    pane.append(text);
    if (part === "content" && pane.text === text) pane.element.scrollIntoView({ block: "nearest" });
  }

  #writeCall({ index, function: { name, arguments: text = "" } }) {
    this.#arrived();
    if (!this.calls[index]) {
      const item = document.createElement("li");
      const [title, code] = [document.createElement("code"), document.createElement("pre")];
      title.textContent = name ?? "";
      item.append(title, code);
      this.find("[data-part=calls]").append(item);
      this.#reveal(item);
      this.calls[index] = code;
      this.#state("calling a tool");
    }
    this.calls[index].append(text);
  }

  #arrived() {
    this.firstSeconds ??= (performance.now() - this.began) / 1000;
  }

  #reveal(element) {
    const extra = element.closest(".extra");
    if (extra) extra.hidden = false;
  }

  #state(words) {
    this.find(".badges").replaceChildren(badge(`${words} …`, "state"));
  }

  #fail(error) {
    const ours = error instanceof Refusal;
    if (!ours) console.error(error);
    tell(this.find(".error"), ours ? error.message : "The stream could not be read; the console says why.");
    if (error.status === 401) byId("key-fold").open = true;
  }

  #settle() {
    const { ending, abort } = this;
    const language = ending?.reasoning_language;
    this.panes.reasoning.declare(language?.detected ?? this.panes.reasoning.element.lang);
    this.panes.content.declare(language?.answer?.detected);
    this.panes.commentary.flush();
    if (ending?.unparsed) {
      this.#reveal(this.unparsed.element);
      this.unparsed.append(ending.unparsed);
      this.unparsed.flush();
    }
    this.panes.content.element.removeAttribute("aria-busy");
    const badges = ending ? [...endingBadges(ending)] : [badge(abort.signal.aborted ? "stopped" : "failed", "fault")];
    if (!this.answer) badges.push(badge("left out of what is sent next", "note"));
    this.find(".badges").replaceChildren(...badges);
    this.find(".figures").textContent = this.#figures();
    this.find(".copy").disabled = !this.answer;
    this.element.classList.remove("running");
  }

  /** Tokens a second are over the whole time, from sending to the end, as the user waits for them. */
  #figures() {
    const seconds = (performance.now() - this.began) / 1000;
    const figures = [];
    if (this.usage) {
      const { completion_tokens: tokens, completion_tokens_details: details } = this.usage;
      figures.push(`${tokens} tokens${details ? `, ${details.reasoning_tokens} of them thinking` : ""}`);
      figures.push(`${(tokens / seconds).toFixed(1)} tokens/s`);
    }
    if (this.firstSeconds !== null) figures.push(`first token after ${this.firstSeconds.toFixed(2)} s`);
    return [...figures, `${seconds.toFixed(2)} s in all`].join(" · ");
  }

  async #copy() {
    announce((await copyText(this.answer)) ? "The answer is copied." : "This browser does not let the page copy.");
  }

  async #showCurl() {
    const place = this.find(".curl");
    place.hidden = !place.hidden;
    this.find(".as-curl").setAttribute("aria-expanded", String(!place.hidden));
    if (place.hidden) return;
    place.textContent = asCurl(this.body);
    announce((await copyText(place.textContent)) ? "The command is copied, and shown." : "The command is shown.");
  }
}

/** How a choice ended. Fields that another server, or an older one, leaves out have no badge. */
function* endingBadges(ending) {
  const { outcome = ending.finish_reason, reasoning_language: language } = ending;
  yield badge(OUTCOMES[outcome] ?? outcome, SOUND_OUTCOMES.includes(outcome) ? "good" : "fault");
  if (language) {
    const { detected = UNDETERMINED, confidence, verdict, requested } = language;
    const found = detected === UNDETERMINED ? "" : nameOf(detected);
    const words = VERDICTS[verdict]?.(found, nameOf(requested)) ?? verdict ?? "language not told";
    const sure = found && confidence != null ? ` (${Math.round(confidence * 100)} % sure)` : "";
    yield badge(words + sure, { followed: "good", not_followed: "fault" }[verdict] ?? "note");
  }
  const spoken = language?.answer?.detected ?? UNDETERMINED;
  if (spoken !== UNDETERMINED) yield badge(`answered in ${nameOf(spoken)}`, "note");
  if (ending.rescued) yield badge("rescued: thinking was closed so that an answer fits", "note");
  if (ending.forced) yield badge("the call was begun for it", "note");
  if (ending.attempts > 1) yield badge(`${ending.attempts} attempts`, "note");
  if (ending.prefilled) yield badge("thinking was begun for it", "note");
  for (const { message } of ending.tool_errors ?? []) yield badge(message, "fault");
}

/** The request for a shell; a key is named by its variable, never written out. */
function asCurl(body) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const key = byId("key").value ? ['  -H "Authorization: Bearer $OPENAI_API_KEY"'] : [];
  const url = new URL("v1/chat/completions", location.href).href;
  return [
    `curl -N ${quoted(url)}`,
    "  -H 'Content-Type: application/json'",
    ...key,
    `  -d ${quoted(JSON.stringify(body, null, 2))}`,
  ].join(" \\\n");
}
