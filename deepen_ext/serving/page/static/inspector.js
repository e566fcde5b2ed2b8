// What is known of one token: candidates with bars, weights, the fused top and the milliseconds.

const inspector = {
  root: document.getElementById("inspector"),
  body: document.getElementById("inspected"),
  spoken: document.getElementById("spoken"),
  shown: null, // [answer, index]

  show(answer, index, aloud) {
    if (this.shown && this.shown[0] === answer && this.shown[1] === index && !aloud) return;
    this.shown = [answer, index];
    const { record, text, decided } = answer.tokens[index];
    const told = explanation(record, decided);
    const seen = record.token.text ? record.token : { text };
    const place = `token ${index + 1} of ${answer.tokens.length}`;
    const by = decided.by === null ? "" : ` m${decided.by % 8}`;
    const sentence = make("p", "verdict");
    for (const part of told) {
      sentence.append(typeof part === "string" ? part : part.name ? make("bdi", "", part.text) : label(part));
    }
    this.body.replaceChildren(
      make("p", `token ${decided.kind}${by}`, label(seen)),
      make("p", "place", `${place}, id ${record.token.id}`),
      sentence,
      weights(record.members),
      ...record.members.map((one, at) => {
        const written = (found) => (at === 0 ? found.id === record.token.id : speaksFor(record, found));
        return candidates(memberLabel(one.name), one.top, written, one.weight);
      }),
      ...silent(answer, record),
      candidates("fused", record.fused, (found) => found.id === record.token.id, null),
      times(answer, index),
    );
    this.root.classList.add("open");
    document.body.classList.add("inspecting");
    if (aloud) this.spoken.textContent = spokenWords(seen, told, place);
  },

  close() {
    this.shown = null;
    this.root.classList.remove("open");
    document.body.classList.remove("inspecting");
    this.body.replaceChildren();
    this.spoken.textContent = "";
  },
};

function spokenWords(token, told, place) {
  const words = told.map((part) => (typeof part === "string" ? part : label(part).textContent));
  return `${label(token).textContent}. ${words.join("")} ${place}`;
}

// One bar of all members' shares.
function weights(members) {
  const made = make("div", "weights");
  made.setAttribute("aria-hidden", "true"); // each member's own heading says it
  for (const one of members) {
    const part = make("i", `m${memberIndex(one.name) % 8}`);
    part.style.flexGrow = one.weight;
    if (one.weight > 0) made.append(part);
  }
  return made;
}

// Those that speak for the token that was written stand out.
function candidates(title, top, written, weight) {
  const head = make("h3", "", title);
  if (weight !== null) head.append(make("span", "weight", `weight ${percent(weight)}`));
  const rows = top.map((one) => {
    const row = make("tr", "", make("td", "", label(one)), make("td", "", bar(one.probability)));
    row.append(make("td", "", percent(one.probability)));
    if (written(one)) row.className = "written";
    return row;
  });
  const colour = typeof title === "string" ? "" : title.className.replace("member", "");
  return make("section", `candidates${colour}`, head, make("table", "", make("tbody", "", ...rows)));
}

// The answer's members that said nothing of this token.
function silent(answer, record) {
  const spoke = new Set(record.members.map((one) => one.name));
  const others = answer.memberNames().filter((name) => !spoke.has(name));
  if (!others.length) return [];
  return [make("p", "silent", ...others.flatMap((name) => [memberLabel(name), " "]), "had no say here")];
}

function times(answer, index) {
  const ms = answer.tokens[index].record.ms;
  const rows = Object.entries(ms.members ?? {}).map(([name, spent]) => [memberLabel(name), spent]);
  for (const stage of ["fusion", "sampling", "handoff"]) {
    if (stage in ms) rows.push([stage === "handoff" ? "hand-off" : stage, ms[stage]]);
  }
  const total = rows.reduce((sum, [, spent]) => sum + spent, 0);
  const tokens = answer.stepTokens(index);
  const lines = rows.map(([name, spent]) => {
    const colour = typeof name === "string" ? "" : name.className.replace("member ", "");
    return make("tr", colour, make("td", "", name), make("td", "", bar(total > 0 ? spent / total : 0)), make("td", "", milliseconds(spent)));
  });
  const shared = tokens > 1 ? `, which gave ${tokens} tokens` : "";
  const head = make("h3", "", "time", make("span", "weight", `${milliseconds(total)} ms in this step${shared}`));
  return make("section", "candidates times", head, make("table", "", make("tbody", "", ...lines)));
}
