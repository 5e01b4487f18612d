// The languages that can be asked for: the endpoint's catalogue.

import { call } from "./endpoint.js";
import { byId } from "./page.js";

let languages = new Map();

export async function loadLanguages() {
  const { data } = await (await call("v1/languages")).json();
  languages = new Map(data.map((language) => [language.tag, language]));
  byId("languages").append(...data.map((language) => {
    const option = document.createElement("option");
    option.value = language.name;
    option.label = `${language.autonym} · ${language.tag}`;
    return option;
  }));
}

export function findLanguage(wish) {
  const key = wish.trim().toLowerCase();
  const names = ({ tag, name, autonym }) => [tag, name, autonym].map((one) => one.toLowerCase());
  return [...languages.values()].find((language) => names(language).includes(key));
}

export const nameOf = (tag) => languages.get(tag)?.name ?? tag;

export const languageOf = (tag) => languages.get(tag);
