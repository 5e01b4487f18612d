// Small things that the page's other scripts share: its elements, sentences for the user, badges, the clipboard.

export const byId = (id) => document.getElementById(id);

export function tell(place, sentence) {
  place.textContent = sentence;
  place.hidden = !sentence;
}

export function announce(sentence) {
  byId("status").textContent = sentence;
}

export function badge(words, kind) {
  const item = document.createElement("li");
  item.className = kind;
  item.textContent = words;
  return item;
}

/** Browsers have no clipboard for pages that came over plain HTTP from elsewhere; the old way still works there. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const [focused, area] = [document.activeElement, document.createElement("textarea")];
    area.className = "unseen";
    area.value = text;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return copied;
  }
}
