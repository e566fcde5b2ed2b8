// The page of a server: a prompt, one or two models, and their answers as they come.

const LIVE = {
  form: document.getElementById("ask"),
  answers: document.getElementById("answers"),
  notice: document.getElementById("notice"),
  keyBox: document.getElementById("key-box"),
  alone: new Set(), // models that are a member alone
  running: null, // aborts what is being written
  listings: 0, // how often the models were asked for

  field(name) {
    return this.form.elements[name];
  },

  key() {
    return this.field("key").value;
  },

  begin() {
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.start();
    });
    this.field("stop").addEventListener("click", () => this.running?.abort());
    this.field("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    });
    this.field("key").addEventListener("change", () => this.listModels());
    document.getElementById("again").addEventListener("click", () => this.listModels());
    for (const name of ["fuser", "draft"]) {
      this.field(name).addEventListener("input", (event) => event.target.setCustomValidity(""));
    }
    this.field("model").addEventListener("change", () => this.chosen());
    this.listModels();
  },

  async listModels() {
    this.notice.hidden = true;
    const listing = ++this.listings;
    try {
      const models = await readModels(this.key());
      if (listing !== this.listings) return; // asked again meanwhile, perhaps with another key
      this.alone = new Set(models.filter((one) => one.deepen?.kind === "member").map((one) => one.id));
      this.offer("model", models);
      this.offer("beside", models, new Option("nobody", ""));
      this.field("start").disabled = false;
      this.chosen();
    } catch (error) {
      if (listing === this.listings) this.tell(error);
    }
  },

  // The models of a chooser; what was chosen before stays.
  offer(name, models, ...first) {
    const before = this.field(name).value;
    const group = (label, found) => {
      const made = make("optgroup", "", ...found.map((one) => new Option(one.id, one.id)));
      made.label = label;
      return found.length ? [made] : [];
    };
    const isAlone = (one) => this.alone.has(one.id);
    this.field(name).replaceChildren(
      ...first,
      ...group("Together", models.filter((one) => !isAlone(one))),
      ...group("One alone", models.filter(isAlone)),
    );
    if (models.some((one) => one.id === before)) this.field(name).value = before;
  },

  // Nobody is fused with a member alone.
  chosen() {
    this.field("fuser").disabled = this.alone.has(this.field("model").value);
  },

  // A problem that belongs to no answer.
  tell(error) {
    if (error.status === 401 || error.status === 403) this.askForKey();
    document.getElementById("notice-text").textContent = error.message;
    this.notice.hidden = false;
  },

  askForKey() {
    this.keyBox.hidden = false;
    this.field("key").focus();
  },

  draft() {
    const given = this.field("draft").value.trim();
    if (given === "" || given === "auto") return given || null;
    const isCount = /^\d{1,2}$/.test(given);
    this.field("draft").setCustomValidity(isCount ? "" : "a number of tokens, 0 for none, or auto");
    return isCount ? Number(given) : null;
  },

  request(model, first) {
    const prompt = this.field("prompt").value;
    const chat = this.field("as").value === "chat";
    const body = { model, stream: true, explain: true, stream_options: { include_usage: true } };
    if (chat) body.messages = [{ role: "user", content: prompt }];
    else body.prompt = prompt;
    body.max_tokens = this.field("tokens").valueAsNumber;
    body.temperature = this.field("temperature").valueAsNumber;
    if (first) { // how members are fused is nothing to a member alone beside them
      const [fuser, draft] = [this.field("fuser").value.trim(), this.draft()];
      if (fuser && !this.field("fuser").disabled) body.fuser = fuser;
      if (draft !== null) body.draft = draft;
    }
    return [chat ? "v1/chat/completions" : "v1/completions", body];
  },

  async start() {
    this.draft();
    if (this.running || !this.form.reportValidity()) return;
    const models = [this.field("model").value, this.field("beside").value].filter(Boolean);
    this.running = new AbortController();
    this.form.classList.add("running");
    this.notice.hidden = true;
    unpin();
    const asked = models.map((model, at) => [new Answer(model), ...this.request(model, at === 0)]);
    this.answers.replaceChildren(...asked.map(([answer]) => answer.root));
    this.answers.classList.toggle("two", asked.length > 1);
    document.body.classList.remove("empty");
    if (matchMedia("(max-width: 999px)").matches) this.answers.scrollIntoView();
    await Promise.all(asked.map(([answer, path, body]) => this.write(answer, path, body)));
    this.running = null;
    this.form.classList.remove("running");
  },

  async write(answer, path, body) {
    const state = { first: 0, last: 0, tokens: 0, reason: "" };
    const signal = this.running.signal;
    let end = "";
    answer.drawn = () => answer.status.textContent = [end, progress(answer, state)].filter(Boolean).join(", ");
    answer.status.textContent = "waiting";
    answer.root.classList.add("writing");
    try {
      await streamText(path, body, this.key(), signal, (chunk) => takeChunk(answer, state, chunk));
      end = { length: "token limit", stop: "complete" }[state.reason] ?? state.reason;
    } catch (error) {
      if (signal.aborted) end = "stopped";
      else {
        end = "cut off";
        const isServers = error instanceof ServerProblem;
        answer.problem.textContent = isServers ? error.message : `The page failed here: ${error.message}`;
        answer.problem.hidden = false;
        if (error.status === 401 || error.status === 403) this.askForKey();
        if (!isServers) console.error(error);
      }
    }
    answer.root.classList.remove("writing");
    answer.drawn();
    inspector.spoken.textContent = `${answer.title.textContent}: ${answer.status.textContent}`; // for screen readers
  },
};

function takeChunk(answer, state, chunk) {
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const text = choice.text ?? choice.delta?.content ?? "";
  for (const name of Object.keys(choice.lost ?? {})) answer.lost.add(name);
  if (choice.finish_reason) state.reason = choice.finish_reason;
  if (chunk.deepen) {
    state.tokens++;
    state.last = performance.now();
    state.first ||= state.last;
    answer.add(chunk.deepen, text);
  } else if (text) answer.addRest(text);
}

function progress(answer, state) {
  if (!state.tokens) return "";
  const words = [answer.summary(state.tokens)];
  const seconds = (state.last - state.first) / 1000;
  const rate = (state.tokens - 1) / seconds;
  if (state.tokens > 1 && seconds > 0) words.push(`${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s`);
  return words.join(", ");
}
