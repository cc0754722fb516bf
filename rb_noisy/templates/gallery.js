"use strict";
{
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const facts = JSON.parse(one("#main").dataset.facts);
  const elements = all(".sample");
  // A decision is the label that the sample is to have; null is undecided.
  const samples = facts.samples.map(([index, given, suggested, file], i) => ({ element: elements[i], index, given, suggested, file, label: null }));
  const sampleOf = (node) => samples[elements.indexOf(node.closest(".sample"))];
  const filters = all("[data-filter]");
  const undoable = [];
  let shown = samples;
  let current = samples[0];

  function decision(sample) {
    if (sample.label === null) return "undecided";
    if (sample.label === sample.given) return "kept";
    return sample.label === sample.suggested ? "accepted" : "another class";
  }

  // Decisions are kept in IndexedDB and not in localStorage: Chromium gives pages that are files an old localStorage, or
  // loses what they wrote, about once in twenty times that one is left for another. Each has a record of its own, so
  // that those of samples that this page does not show stay.
  const database = new Promise((resolve, reject) => {
    const request = indexedDB.open("rb-noisy");
    request.onupgradeneeded = () => request.result.createObjectStore("decisions", { keyPath: ["data", "index"] });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  // Where the browser keeps nothing (some do not for files, or in private windows), the page works and says so.
  const unkept = () => (one("#unkept").hidden = false);

  async function keep(changed) {
    try {
      const transaction = (await database).transaction("decisions", "readwrite");
      transaction.onabort = unkept;
      const decisions = transaction.objectStore("decisions");
      for (const { index, label } of changed) {
        if (label === null) decisions.delete([facts.key, index]);
        else decisions.put({ data: facts.key, index, label });
      }
      transaction.commit(); // at once: the page may be left
    } catch {
      unkept();
    }
  }

  async function load() {
    try {
      const decisions = (await database).transaction("decisions").objectStore("decisions");
      const request = decisions.getAll(IDBKeyRange.bound([facts.key], [facts.key, []]));
      await new Promise((resolve, reject) => {
        request.onsuccess = resolve;
        request.onerror = () => reject(request.error);
      });
      const labels = new Map(request.result.map(({ index, label }) => [index, label]));
      for (const sample of samples) {
        if (sample.label === null && labels.get(sample.index) in facts.classes) sample.label = labels.get(sample.index);
      }
    } catch {
      unkept();
    }
    samples.forEach(paint);
    filter();
    list.removeAttribute("aria-busy");
  }

  // The address after # holds the filters, so that a link to it does too.
  const state = () => new URLSearchParams(location.hash.slice(1));

  function change(changes) {
    const next = state();
    for (const [name, value] of Object.entries(changes)) value ? next.set(name, value) : next.delete(name);
    history.replaceState(null, "", `#${next}`);
    filter();
  }

  function filter() {
    const now = state();
    const wanted = {};
    for (const control of filters) {
      const value = now.get(control.dataset.filter) ?? "";
      const there = !control.options || [...control.options].some((option) => option.value === value);
      wanted[control.dataset.filter] = control.value = there ? value : "";
    }
    const text = wanted.find.trim().toLowerCase();
    shown = samples.filter(
      (sample) =>
        (!wanted.given || sample.given === Number(wanted.given)) &&
        (!wanted.suggested || sample.suggested === Number(wanted.suggested)) &&
        (!wanted.decision || decision(sample) === wanted.decision) &&
        `#${sample.index} ${sample.file ?? ""}`.toLowerCase().includes(text),
    );
    const visible = new Set(shown);
    for (const sample of samples) sample.element.hidden = !visible.has(sample);
    if (shown.length && !visible.has(current)) makeCurrent(shown[0]);
    one("#count").textContent = `${shown.length} of ${samples.length} samples shown`;
    one("#none").hidden = shown.length > 0;
    count();
  }

  function count() {
    const number = (what) => samples.filter((sample) => decision(sample) === what).length;
    const [undecided, accepted, unchanged, other] = ["undecided", "accepted", "kept", "another class"].map(number);
    one("#decided").textContent = `${samples.length - undecided} of ${samples.length} decided: ${accepted} accepted, ${unchanged} kept, ${other} other`;
    const open = shown.filter((sample) => sample.label === null).length;
    one("#accept span").textContent = open;
    one("#accept").disabled = !open;
    one("#undo").disabled = !undoable.length;
    one("#download span:last-child").textContent = accepted + other;
    one("#download").disabled = !(accepted + other);
  }

  function paint(sample) {
    const now = decision(sample);
    sample.element.dataset.state = now;
    one(".state", sample.element).textContent = now === "another class" ? `${now}: ${facts.classes[sample.label]}` : now;
    for (const button of all("[data-choose]", sample.element)) {
      button.setAttribute("aria-pressed", sample.label !== null && sample.label === sample[button.dataset.choose]);
    }
    const select = one("select", sample.element);
    if (now === "another class") fill(select);
    select.value = now === "another class" ? sample.label : "";
    select.classList.toggle("chosen", now === "another class");
  }

  // A list is filled when it is wanted: hundreds of samples with hundreds of classes each would be a slow page.
  function fill(select) {
    if (select.length === 1) select.append(...facts.classes.map((name, label) => new Option(name, label)));
  }

  function settle(changed) {
    keep(changed);
    changed.forEach(paint);
    count();
  }

  function decide(decided, label) {
    const changed = decided.filter((sample) => sample.label !== label(sample));
    if (!changed.length) return;
    undoable.push(changed.map((sample) => [sample, sample.label]));
    for (const sample of changed) sample.label = label(sample);
    settle(changed);
  }

  function undo() {
    const before = undoable.pop();
    if (!before) return;
    for (const [sample, label] of before) sample.label = label;
    settle(before.map(([sample]) => sample));
    focusOn(before.length === 1 ? before[0][0] : current);
  }

  // One sample at a time is on the way of the Tab key, with what is in it.
  function makeCurrent(sample) {
    const stops = ({ element }) => [element, ...all("button, select", element)];
    for (const stop of stops(current)) stop.tabIndex = -1;
    for (const stop of stops(sample)) stop.tabIndex = 0;
    current = sample;
  }

  function focusOn(sample) {
    if (sample.element.hidden) return;
    sample.element.focus();
    sample.element.scrollIntoView({ block: "nearest" });
  }

  function move(by) {
    const place = Math.min(shown.length - 1, Math.max(0, shown.indexOf(current) + by));
    if (shown.length) focusOn(shown[place]);
  }

  const list = one("#samples");
  const columns = () => getComputedStyle(list).gridTemplateColumns.split(" ").length;
  const keys = {
    ArrowRight: () => move(1),
    ArrowLeft: () => move(-1),
    ArrowDown: () => move(columns()),
    ArrowUp: () => move(-columns()),
    a: () => (decide([current], (sample) => sample.suggested), move(1)),
    k: () => (decide([current], (sample) => sample.given), move(1)),
    u: () => decide([current], () => null),
    c: () => one("select", current.element).focus(),
    z: undo,
  };

  list.addEventListener("focusin", (event) => {
    makeCurrent(sampleOf(event.target));
    if (event.target.matches("select")) fill(event.target);
  });
  // Before the browser shows the list, which on a phone may be before it gets the focus.
  list.addEventListener("pointerdown", (event) => event.target.matches("select") && fill(event.target));
  list.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.target.matches("select")) {
      if (event.key === "Escape") focusOn(current);
      return; // its own keys choose a class
    }
    const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
  list.addEventListener("click", (event) => {
    const button = event.target.closest("[data-choose]");
    if (!button) return;
    const pressed = button.getAttribute("aria-pressed") === "true";
    decide([sampleOf(button)], (sample) => (pressed ? null : sample[button.dataset.choose]));
  });
  list.addEventListener("change", ({ target }) => decide([sampleOf(target)], () => (target.value === "" ? null : Number(target.value))));

  one("#undo").addEventListener("click", undo);
  one("#accept").addEventListener("click", () => decide(shown.filter((sample) => sample.label === null), (sample) => sample.suggested));

  // As rb_noisy/csv_files.py: no spreadsheet takes a name for a formula.
  const formula = /^'*[=+\-@\t\r]/;
  const numeric = /^([+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf)$/i;
  const harmless = (value) => (formula.test(value) && !numeric.test(value) ? `'${value}` : value);
  const quoted = (value) => (/[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);

  one("#download").addEventListener("click", () => {
    const file = samples[0].file !== null;
    const name = (label) => facts.classes[label];
    const corrected = samples.filter((sample) => sample.label !== null && sample.label !== sample.given);
    const rows = corrected.map((s) => [String(s.index), ...(file ? [s.file] : []), name(s.given), name(s.suggested), name(s.label)]);
    const lines = [["index", ...(file ? ["file"] : []), "given", "suggested", "label"], ...rows];
    const text = lines.map((line) => `${line.map(harmless).map(quoted).join(",")}\r\n`).join("");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = "corrections.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  });

  for (const control of filters) {
    control.addEventListener(control.matches("select") ? "change" : "input", () => change({ [control.dataset.filter]: control.value }));
  }
  const reset = () => change(Object.fromEntries(filters.map((control) => [control.dataset.filter, ""])));
  for (const id of ["#reset", "#reset-too"]) one(id).addEventListener("click", reset);
  addEventListener("hashchange", filter);

  list.setAttribute("aria-busy", "true"); // until the decisions are there
  makeCurrent(current);
  filter();
  load();
}
