// Making elements. What a model or a server wrote goes through textContent alone, never through HTML.

function make(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

// Spaces at the ends, line breaks and characters without a shape of their own.
const INVISIBLE =
  /^ +| +$|[\p{Control}\p{Default_Ignorable_Code_Point}\u2028\u2029\u2800\ufff9-\ufffb]|(?! )\p{Space_Separator}/gu;
const NAMES = { "\n": "↵", "\t": "⇥", "\r": "␍" };

// A token in a label: nothing in it is invisible, and it turns nothing around beside it.
function label({ text, bytes }) {
  const made = make("bdi", "label");
  if (text === "") {
    made.append(make("span", "sign", "no text"));
    return made;
  }
  let end = 0;
  for (const found of text.matchAll(INVISIBLE)) {
    const one = found[0];
    const code = one.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    const sign = one[0] === " " ? "·".repeat(one.length) : NAMES[one] ?? `U+${code}`;
    made.append(text.slice(end, found.index), make("span", "sign", sign));
    end = found.index + one.length;
  }
  made.append(text.slice(end));
  if (bytes) made.append(make("span", "sign", ` ${bytes}`)); // a part of a character: U+FFFD tells it from no other
  return made;
}

// A member's name beside a spot of its colour.
function memberLabel(name) {
  const spot = make("i", "spot");
  spot.setAttribute("aria-hidden", "true");
  return make("span", `member m${memberIndex(name) % 8}`, spot, make("bdi", "", name));
}

function percent(share) {
  if (share > 0 && share < 0.001) return "<0.1 %";
  return `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
}

function bar(share) {
  const fill = make("i");
  fill.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
  const made = make("span", "bar", fill);
  made.setAttribute("aria-hidden", "true");
  return made;
}

function milliseconds(ms) {
  return ms >= 100 ? ms.toFixed(0) : ms >= 10 ? ms.toFixed(1) : ms.toFixed(2);
}
