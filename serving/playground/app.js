// The playground: asks the endpoint that this page came from, and shows the channels as they come.
// What a model or a server wrote goes into the page as text alone, never as markup.

import { call } from "./endpoint.js";
import { findLanguage, loadLanguages } from "./languages.js";
import { announce, byId, tell } from "./page.js";
import { Turn } from "./turn.js";

const EXAMPLES = [
  ["French", "Combien de fois la lettre « c » est-elle présente dans « cacahuète » ?"],
  ["Japanese", "ケニアの首都はどこですか。"],
  ["Arabic", "أيهما أكبر: ٩٫٩ أم ٩٫١١؟"],
];

const turns = [];
let running = null;

async function loadModels() {
  const select = byId("model");
  try {
    const { data } = await (await call("v1/models")).json();
    select.replaceChildren(...data.map(({ id }) => new Option(id)));
    tell(byId("notice"), "");
  } catch (error) {
    if (error.status === 401) byId("key-fold").open = true;
    tell(byId("notice"), error.message);
  }
}

/** What is sent: turns that have an answer without their thinking, which Harmony drops, then the question. */
function requestBody(question) {
  const said = (role, content) => ({ role, content });
  const number = (id) => (byId(id).value === "" ? undefined : Number(byId(id).value));
  const system = byId("system").value.trim();
  return {
    model: byId("model").value,
    messages: [
      ...(system ? [said("system", system)] : []),
      ...turns.filter((turn) => turn.answer).flatMap((turn) => [said("user", turn.question), said("assistant", turn.answer)]),
      said("user", question),
    ],
    reasoning_language: byId("language").value.trim() || undefined,
    reasoning_effort: byId("effort").value || undefined,
    temperature: number("temperature"),
    max_completion_tokens: number("maximum-tokens"),
    stream: true,
    stream_options: { include_usage: true },
  };
}

async function ask() {
  const field = byId("question");
  const question = field.value.trim();
  if (running || !question) return;
  if (!byId("model").value) await loadModels();
  if (running || !byId("model").value) return;
  const turn = new Turn(question, requestBody(question));
  running = turn;
  turns.push(turn);
  field.value = "";
  field.focus();
  showRunning();
  turn.element.scrollIntoView({ block: "start" });
  const ended = await turn.run();
  if (running !== turn) return;
  running = null;
  // A question without any answer can be sent again without being typed again.
  if (!ended && !turn.answer && !field.value) field.value = question;
  showRunning();
}

function stop() {
  if (!running) return;
  running.abort.abort();
  announce("Stopped.");
  byId("question").focus();
}

function startAnew() {
  running?.abort.abort();
  running = null;
  turns.length = 0;
  byId("turns").replaceChildren();
  showRunning();
  byId("question").focus();
}

function showRunning() {
  byId("welcome").hidden = turns.length > 0;
  byId("send").disabled = running !== null;
  byId("stop").disabled = running === null;
}

function showExamples() {
  byId("examples").append(...EXAMPLES.map(([language, question]) => {
    const [item, button] = [document.createElement("li"), document.createElement("button")];
    button.type = "button";
    button.dir = "auto";
    button.lang = findLanguage(language)?.tag ?? "";
    button.textContent = question;
    button.addEventListener("click", () => {
      byId("language").value = language;
      byId("question").value = question;
      byId("question").focus();
    });
    item.append(button);
    return item;
  }));
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
byId("question").addEventListener("keydown", (event) => {
  // While an input method composes, Enter chooses a word.
  // Safari ends the composition first, and tells it by the key code alone.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  if (!running) byId("composer").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing) stop();
});
byId("stop").addEventListener("click", stop);
byId("new").addEventListener("click", startAnew);
byId("key").addEventListener("change", loadModels);

await Promise.all([loadLanguages().catch((error) => tell(byId("notice"), error.message)), loadModels()]);
showExamples();
document.body.dataset.ready = "true";
