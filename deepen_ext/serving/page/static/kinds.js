// Who decided a token: from a record of `deepen_ext.decoding.trace.Trace` to a kind with its words.

const memberNames = []; // by first appearance; the index gives a member its colour and its underline

function memberIndex(name) {
  const found = memberNames.indexOf(name);
  return found < 0 ? memberNames.push(name) - 1 : found;
}

// In the order of the legend: the name with `{}` for a member's, and what it means.
const KINDS = {
  own: ["by {} alone", "written without anybody beside it"],
  agreed: ["agreed", "every member that was asked had it first"],
  kept: ["kept", "the main model's choice, though an assistant had another first"],
  changed: ["changed by {}", "not the main model's choice; this member spoke most for it"],
  joint: ["changed together", "not the main model's choice, and among no one assistant's best"],
  settled: ["settled", "by the main model alone: no assistant could have changed it"],
  satout: ["sat out", "by the main model alone: the assistants had no say here"],
  drawn: ["drawn", "sampling or a rule took it, not the most probable token"],
  stood: ["draft stood", "written ahead, then verified and kept"],
  replaced: ["draft replaced", "another token had been written ahead here"],
};

// Values of `not_asked`: `Reason` in deepen_ext/decoding/places.py.
const REASONS = {
  __proto__: null,
  settled: "no assistant could have changed it, by the certificate",
  gated: "the main model was sure enough for the confidence gate",
  "unfinished character": "a character was unfinished, and assistants read whole characters",
  boundary: "an assistant's last token may become part of a longer one",
  sure: "the main model was not torn between two words",
  "main model drawn": "the draw fell on the main model",
  "no weight": "the assistants read the prompt so much worse that they have no say in this text",
  lost: "no assistant was left",
};

// A token's bytes in hexadecimal. Parts of characters have them in the record: their text is U+FFFD, whichever they are.
function bytesOf(token) {
  if (token.bytes) return token.bytes;
  return Array.from(new TextEncoder().encode(token.text), (one) => one.toString(16).padStart(2, "0")).join("");
}

// Whether an assistant's candidate speaks for the token. Vocabularies differ: " Antarctica" of an assistant
// speaks for " Ant" of a main model that has no such token. One that the main model has itself speaks for that.
function speaksFor(record, candidate) {
  const [written, said] = [bytesOf(record.token), bytesOf(candidate)];
  if (said === written) return true;
  if (record.token.text.trim() === "" || !said.startsWith(written)) return false;
  return ![...record.members[0].top, ...record.fused].some((one) => bytesOf(one) === said);
}

// How much a member's candidates speak for the token.
function supportOf(record, member) {
  let sum = 0;
  for (const one of member.top) if (speaksFor(record, one)) sum += one.probability;
  return sum * member.weight;
}

// {kind, by}: a key of KINDS, and the index of the member that it names or null.
function verdict(record) {
  const [main, ...assistants] = record.members;
  const isMainChoice = record.token.id === record.main_choice.id;
  if (!assistants.length) {
    if (!isMainChoice) return { kind: "drawn", by: null };
    if (record.not_asked === null) return { kind: "own", by: main ? memberIndex(main.name) : null };
    return { kind: record.not_asked === "settled" ? "settled" : "satout", by: null };
  }
  if (record.fused.length && record.fused[0].id !== record.token.id) return { kind: "drawn", by: null };
  if (isMainChoice) {
    const all = assistants.every((one) => !one.top.length || speaksFor(record, one.top[0]));
    return { kind: all ? "agreed" : "kept", by: null };
  }
  let best = null;
  let most = 0;
  for (const one of assistants) {
    const support = supportOf(record, one);
    if (support > most) [best, most] = [one, support];
  }
  return best ? { kind: "changed", by: memberIndex(best.name) } : { kind: "joint", by: null };
}

// A sentence about the token, as parts: strings, tokens, and {text, name} for names.
function explanation(record, { kind, by }) {
  const told = [];
  if (kind === "own") told.push("Written by this model alone.");
  else if (kind === "agreed") told.push("All agreed.");
  else if (kind === "kept") told.push("The main model's choice stood, though an assistant had another first.");
  else if (kind === "changed") told.push("Changed by ", { text: memberNames[by], name: true }, ". ");
  else if (kind === "joint") told.push("Changed by the assistants together. ");
  else if (kind === "drawn") told.push("Sampling or a rule took it, not the most probable token. ");
  else told.push("By the main model alone: ", REASONS[record.not_asked] ?? record.not_asked, ".");
  if (record.token.id !== record.main_choice.id) {
    told.push("The main model alone would have written ", record.main_choice, ".");
  }
  if (record.draft === "stood") told.push(" It was written ahead, and stood.");
  if (record.draft === "replaced") told.push(" Another token had been written ahead here.");
  if (record.lost?.length) told.push(" Lost before: ", { text: record.lost.join(", "), name: true }, ".");
  return told;
}
