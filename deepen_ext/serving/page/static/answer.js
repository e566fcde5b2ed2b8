// One text, token by token. Tokens are appended in batches, one a frame; what stands is never drawn again.

const MOST_A_FRAME = 400;
const MEMBER_KINDS = ["own", "changed"]; // one entry of the legend for each member
let answersMade = 0;

class Answer {
  constructor(title) {
    this.id = `a${answersMade++}`;
    this.tokens = []; // {record, text, decided}
    this.parts = []; // the elements of each token: one, and one more for each line that it goes on to
    this.waiting = [];
    this.drawn = () => {}; // called after each batch
    this.counts = new Map();
    this.names = new Set();
    this.lost = new Set(); // members' names
    this.only = null; // the key of the kind that is shown alone
    this.current = -1;
    this.frame = 0;
    this.text = make("div", "text");
    this.text.tabIndex = 0;
    this.text.setAttribute("role", "group");
    this.text.setAttribute("aria-describedby", "keys");
    this.title = make("h2", "", make("bdi", "", title));
    this.status = make("p", "status");
    this.problem = make("p", "problem");
    this.problem.setAttribute("role", "alert");
    this.problem.hidden = true;
    this.legend = make("div", "legend");
    this.copy = make("button", "quiet", "Copy");
    this.copy.type = "button";
    this.copy.addEventListener("click", () => this.copyText());
    const head = make("header", "", this.title, this.copy, this.status);
    this.root = make("article", "answer", head, this.legend, this.text, this.problem);
    this.title.id = `${this.id}-title`;
    this.root.setAttribute("aria-labelledby", this.title.id);
    this.text.setAttribute("aria-labelledby", this.title.id);
    this.copy.setAttribute("aria-describedby", this.title.id);
    this.line = null;
    this.listen();
  }

  add(record, text) {
    for (const one of record.members) {
      memberIndex(one.name); // the main model comes first, and has the first colour
      this.names.add(one.name);
    }
    for (const name of record.lost ?? []) this.lost.add(name);
    const decided = verdict(record);
    const keys = [MEMBER_KINDS.includes(decided.kind) ? `${decided.kind} ${decided.by}` : decided.kind];
    if (isDrafted(record)) keys.push(record.draft);
    for (const key of keys) this.counts.set(key, (this.counts.get(key) ?? 0) + 1);
    this.waiting.push({ record, text, decided, keys });
    if (!this.frame) this.frame = requestAnimationFrame(() => this.draw());
  }

  // The rest of a character that was unfinished at the end: no token of its own.
  addRest(text) {
    this.rest = make("span", "", text);
    if (!this.frame) this.frame = requestAnimationFrame(() => this.draw());
  }

  plainText() {
    return [...this.tokens, ...this.waiting].map((one) => one.text).join("") + (this.rest?.textContent ?? "");
  }

  async copyText() {
    const copied = await navigator.clipboard?.writeText(this.plainText()).then(() => true, () => false);
    this.copy.textContent = copied || this.copySelected() ? "Copied" : "Could not copy";
    setTimeout(() => { this.copy.textContent = "Copy"; }, 2000);
  }

  // Over plain HTTP, from another machine, browsers have no navigator.clipboard.
  copySelected() {
    const area = make("textarea", "unseen");
    area.value = this.plainText();
    this.copy.after(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    this.copy.focus();
    return copied;
  }

  memberNames() {
    return [...this.names];
  }

  draw() {
    this.frame = 0;
    const follows = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 40;
    const batch = this.waiting.splice(0, MOST_A_FRAME);
    for (const one of batch) this.append(one);
    this.showLegend();
    if (this.rest && !this.waiting.length) (this.line ?? this.text).append(this.rest);
    if (follows) this.text.scrollTop = this.text.scrollHeight;
    this.drawn();
    if (this.waiting.length) this.frame = requestAnimationFrame(() => this.draw());
  }

  append(token) {
    const { record, text, decided, keys } = token;
    const index = this.tokens.push(token) - 1;
    const by = decided.by === null ? "" : ` m${decided.by % 8}`;
    const className = `t ${decided.kind}${by}${isDrafted(record) ? ` ${record.draft}` : ""}${keys.includes(this.only) ? " shown" : ""}`;
    const lines = text.split("\n");
    this.parts.push(lines.map((piece, at) => {
      if (at > 0 || !this.line) this.line = this.text.appendChild(make("div", "line"));
      // A space before a word is no part of what is marked: marks end where the word does.
      const space = /^ (?=[^ ])/.test(piece) ? " " : "";
      if (space) this.line.append(space);
      const sign = at < lines.length - 1 ? " broken" : piece === "" && at === 0 ? " empty" : "";
      const part = make("span", className + sign, piece.slice(space.length));
      part.dataset.i = index;
      return this.line.appendChild(part);
    }));
    this.parts[index][0].id = `${this.id}-${index}`;
  }

  changed() {
    let sum = 0;
    for (const [key, count] of this.counts) if (/^(changed|joint)/.test(key)) sum += count;
    return sum;
  }

  summary(tokens) {
    const words = [`${tokens} tokens`];
    if (this.names.size > 1) words.push(`${this.changed()} changed`);
    for (const name of this.lost) words.push(`\u2068${name}\u2069 lost`); // isolated: a name may run from the right
    return words.join(", ");
  }

  // One button for each kind that occurs; made once, then only its count changes.
  showLegend() {
    for (const [key, count] of this.counts) {
      let button = this.legend.querySelector(`[data-key="${key}"]`);
      if (!button) {
        button = this.legendButton(key);
        const order = (one) => Object.keys(KINDS).indexOf(one.dataset.key.split(" ")[0]);
        const next = [...this.legend.children].find((one) => order(one) > order(button));
        this.legend.insertBefore(button, next ?? null);
      }
      button.lastChild.textContent = count;
    }
  }

  legendButton(key) {
    const [kind, by] = key.split(" ");
    const [name, meaning] = KINDS[kind];
    const words = make("span", "", name.split("{}")[0]);
    if (by !== undefined) words.append(make("bdi", "", memberNames[by]), name.split("{}")[1]);
    const button = make("button", "", sampleOf(kind, by), words, make("b", "", ""));
    button.type = "button";
    button.title = meaning;
    button.dataset.key = key;
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => this.single(button));
    return button;
  }

  // Show the tokens of one kind alone; the others fade.
  single(button) {
    const on = button.getAttribute("aria-pressed") !== "true";
    for (const one of this.legend.children) one.setAttribute("aria-pressed", String(on && one === button));
    this.only = on ? button.dataset.key : null;
    this.text.classList.toggle("only", on);
    this.tokens.forEach(({ keys }, i) => {
      for (const part of this.parts[i]) part.classList.toggle("shown", keys.includes(this.only));
    });
  }

  listen() {
    const at = (event) => {
      const part = event.target.closest?.("[data-i]");
      return part ? Number(part.dataset.i) : -1;
    };
    this.text.addEventListener("pointerover", (event) => {
      const moved = event.clientX !== pointer.x || event.clientY !== pointer.y; // not the text below it
      if (moved && event.pointerType !== "touch" && at(event) >= 0) inspector.show(this, at(event), false);
    });
    this.text.addEventListener("pointerleave", () => {
      if (pinned) inspector.show(pinned, pinned.current, false);
    });
    this.text.addEventListener("click", (event) => {
      if (at(event) >= 0 && getSelection().isCollapsed) this.select(at(event), false);
    });
    this.text.addEventListener("focus", () => {
      if (this.current < 0 && this.tokens.length && this.text.matches(":focus-visible")) this.select(0, true);
    });
    this.text.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !this.tokens.length) return;
    const last = this.tokens.length - 1;
    const to = {
      ArrowRight: () => Math.min(this.current + 1, last),
      ArrowLeft: () => Math.max(this.current - 1, 0),
      ArrowDown: () => this.beside(1),
      ArrowUp: () => this.beside(-1),
      Home: () => 0,
      End: () => last,
      n: () => this.nextChanged(1),
      p: () => this.nextChanged(-1),
    }[event.key];
    if (event.key === "Escape") unpin();
    else if (to) this.select(to(), true);
    else return;
    event.preventDefault();
  }

  // The nearest token of the line below (1) or above (-1).
  beside(step) {
    const box = (index) => this.parts[index][0].getBoundingClientRect();
    const start = Math.max(this.current, 0);
    const from = box(start);
    let best = start;
    let line = null;
    for (let i = start + step; i >= 0 && i < this.parts.length; i += step) {
      const now = box(i);
      if (line === null && step * (now.top - from.top) > 4) line = now.top;
      if (line === null) continue;
      if (Math.abs(now.top - line) > 4) break;
      if (best === start || Math.abs(now.left - from.left) < Math.abs(box(best).left - from.left)) best = i;
    }
    return best;
  }

  nextChanged(step) {
    const counts = (one) => ["changed", "joint"].includes(one.decided.kind);
    for (let i = this.current + step; i >= 0 && i < this.tokens.length; i += step) {
      if (counts(this.tokens[i])) return i;
    }
    return Math.max(this.current, 0);
  }

  select(index, aloud) {
    unpin();
    pinned = this;
    this.current = index;
    for (const part of this.parts[index]) part.classList.add("at");
    this.text.setAttribute("aria-activedescendant", `${this.id}-${index}`);
    this.parts[index][0].scrollIntoView({ block: "nearest" });
    inspector.show(this, index, aloud);
  }

  // How many tokens the step of this one gave: their records have the same times.
  stepTokens(index) {
    const times = (i) => JSON.stringify(this.tokens[i].record.ms);
    const own = times(index);
    let [first, last] = [index, index];
    while (first > 0 && times(first - 1) === own) first--;
    while (last + 1 < this.tokens.length && times(last + 1) === own) last++;
    return last - first + 1;
  }
}

function isDrafted(record) {
  return record.draft === "stood" || record.draft === "replaced";
}

function sampleOf(kind, by) {
  const sample = make("span", `sample t ${kind}${by === undefined ? "" : ` m${by % 8}`}`, "ab");
  sample.setAttribute("aria-hidden", "true");
  return sample;
}

for (const [kind, [name, meaning]] of Object.entries(KINDS)) {
  if (kind === "own") continue; // it has no mark
  const words = make("dd", "", make("b", "", name.replace("{}", "…")), `: ${meaning}`);
  const sample = make("dt", "", sampleOf(kind, kind === "changed" ? 1 : undefined));
  document.getElementById("meanings").append(make("div", "", sample, words));
}

const pointer = { x: -1, y: -1 };
document.addEventListener("pointermove", (event) => Object.assign(pointer, { x: event.clientX, y: event.clientY }));

let pinned = null; // the answer whose token was selected

function unpin() {
  if (pinned) {
    for (const part of pinned.parts[pinned.current]) part.classList.remove("at");
    pinned.text.removeAttribute("aria-activedescendant");
    pinned = null;
  }
  inspector.close();
}
document.getElementById("close").addEventListener("click", unpin);
