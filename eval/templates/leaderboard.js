"use strict";
{
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const SVG = "http://www.w3.org/2000/svg";
  const rows = all("#board tbody tr");
  const heads = all("#board th[data-key]");
  const filters = all("select[data-filter]");
  const dialogs = all("dialog");
  const datasets = all("#legend [data-dataset]").map((item) => item.dataset.dataset);
  const scatter = one("#scatter");
  const tip = one("#tip");
  let shown = rows;

  // The address after # is the whole state: filters, order and the open card. A link to it keeps them.
  const state = () => new URLSearchParams(location.hash.slice(1));

  function change(changes, keepInHistory = false) {
    const next = state();
    for (const [name, value] of Object.entries(changes)) value ? next.set(name, value) : next.delete(name);
    const address = `#${next}`;
    if (keepInHistory) location.hash = address;
    else history.replaceState(null, "", address);
    apply();
  }

  function apply() {
    const now = state();
    for (const select of filters) {
      const value = now.get(select.dataset.filter) ?? "";
      select.value = [...select.options].some((option) => option.value === value) ? value : "";
    }
    shown = rows.filter((row) => filters.every((s) => !s.value || row.dataset[s.dataset.filter] === s.value));
    for (const row of rows) row.hidden = !shown.includes(row);
    one("#count").textContent = `${shown.length} of ${rows.length} models shown`;
    one("#none").hidden = shown.length > 0;
    sort(now.get("sort"), now.get("order"));
    draw();
    openCard(now.get("card"));
  }

  function sort(key, order) {
    const column = heads.findIndex((head) => head.dataset.key === key);
    const descending = order === "descending";
    heads.forEach((head, i) => head.setAttribute("aria-sort", i !== column ? "none" : descending ? "descending" : "ascending"));
    const value = (row) => row.cells[column].dataset.sort;
    const numeric = column >= 0 && rows.every((row) => value(row) === "" || Number.isFinite(Number(value(row))));
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // what is not known comes last either way
      const difference = numeric ? x - y : x.localeCompare(y, "en", { numeric: true });
      return descending ? -difference : difference;
    };
    const ordered = column < 0 ? rows : [...rows].sort(compare); // a stable sort: equals keep the order by rank
    one("#board tbody").append(...ordered);
  }

  for (const head of heads) {
    one("button", head).addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const next = now === "none" ? head.dataset.first : now === "ascending" ? "descending" : "ascending";
      change({ sort: head.dataset.key, order: next });
    });
  }
  for (const select of filters) select.addEventListener("change", () => change({ [select.dataset.filter]: select.value }));
  const reset = () => change(Object.fromEntries(filters.map((select) => [select.dataset.filter, ""])));
  for (const id of ["#reset", "#reset-too"]) one(id).addEventListener("click", reset);
  addEventListener("hashchange", apply);

  // Cards
  const number = (row) => row.id.slice("row-".length);

  function openCard(id) {
    const row = rows.find((candidate) => id && candidate.dataset.id === id);
    const wanted = row ? one(`#card-${number(row)}`) : null;
    for (const dialog of dialogs) if (dialog.open && dialog !== wanted) dialog.close();
    if (wanted && !wanted.open) wanted.showModal();
  }

  for (const row of rows) one(".name button", row).addEventListener("click", () => change({ card: row.dataset.id }, true));
  for (const dialog of dialogs) {
    one("[data-close]", dialog).addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => {
      if (event.target !== dialog) return;
      const box = dialog.getBoundingClientRect(); // its own padding is a part of the card, what surrounds it is not
      const outside = event.clientX < box.left || event.clientX > box.right || event.clientY < box.top || event.clientY > box.bottom;
      if (outside) dialog.close();
    });
    dialog.addEventListener("close", () => {
      const row = rows.find((candidate) => candidate.dataset.id === state().get("card"));
      if (row && one(`#card-${number(row)}`) === dialog) change({ card: "" });
    });
  }

  // The scatter
  function element(name, attributes, parent, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  function axis(values, length, apart) {
    const low = Math.min(...values);
    const high = Math.max(...values);
    const room = Math.max(1, (high - low) * 0.06);
    const [from, to] = [Math.max(0, low - room), Math.min(100, high + room)];
    const step = [1, 2, 5, 10, 20, 50].find((size) => ((to - from) / size) * apart <= length) ?? 100;
    const ticks = [];
    for (let tick = Math.ceil(from / step) * step; tick <= to; tick += step) ticks.push(tick);
    return { at: (value) => ((value - from) / (to - from)) * length, ticks };
  }

  function shape(series, x, y, hollow, parent) {
    const kind = `shape${hollow ? " hollow" : ""}`;
    if (series % 3 === 0) element("circle", { class: kind, cx: x, cy: y, r: 5 }, parent);
    else if (series % 3 === 1) element("rect", { class: kind, x: x - 4.5, y: y - 4.5, width: 9, height: 9 }, parent);
    else element("path", { class: kind, d: `M${x} ${y - 5.5}L${x + 5.5} ${y + 4.5}L${x - 5.5} ${y + 4.5}Z` }, parent);
  }

  function draw() {
    const focused = document.activeElement?.dataset?.point;
    scatter.replaceChildren();
    tip.hidden = true;
    for (const item of all("#legend [data-dataset]")) item.hidden = !shown.some((row) => row.dataset.dataset === item.dataset.dataset);
    const drawn = shown.filter((row) => row.dataset.natural && row.dataset.robust);
    const absent = shown.length - drawn.length;
    one("#absent").textContent = absent ? `${absent} of the models shown have no figure for one of the two and are not drawn.` : "";
    if (!drawn.length) {
      scatter.textContent = "None of the models shown has both figures.";
      return;
    }
    const width = Math.max(280, scatter.clientWidth);
    const height = Math.round(Math.min(420, Math.max(260, width * 0.5)));
    const [left, right, top, bottom] = [48, 14, 10, 44];
    const ends = (row) => [row.dataset.robust, row.dataset.low || row.dataset.robust, row.dataset.high || row.dataset.robust].map(Number);
    const across = axis(drawn.map((row) => Number(row.dataset.natural)), width - left - right, 60);
    const up = axis(drawn.flatMap(ends), height - top - bottom, 36);
    const x = (value) => left + across.at(value);
    const y = (value) => height - bottom - up.at(value);
    const svg = element("svg", { width, height, viewBox: `0 0 ${width} ${height}` }, scatter);
    for (const tick of up.ticks) {
      element("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }, svg);
      element("text", { x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, svg, tick);
    }
    for (const tick of across.ticks) {
      element("line", { class: "grid", x1: x(tick), x2: x(tick), y1: top, y2: height - bottom }, svg);
      element("text", { x: x(tick), y: height - bottom + 17, "text-anchor": "middle" }, svg, tick);
    }
    element("text", { class: "title", x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle" }, svg, "natural accuracy, %");
    element("text", { class: "title", transform: `translate(13 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, svg, "AutoAttack accuracy, %");

    const ordered = [...drawn].sort((a, b) => a.dataset.natural - b.dataset.natural);
    const points = ordered.map((row) => {
      const series = datasets.indexOf(row.dataset.dataset);
      const label = row.dataset.label;
      const group = element("g", { class: `point s${series % 5}`, role: "button", tabindex: -1, "aria-label": label, "data-point": row.id }, svg);
      const [px, py] = [x(row.dataset.natural), y(row.dataset.robust)];
      if (row.dataset.low) element("line", { class: "whisker", x1: px, x2: px, y1: y(row.dataset.low), y2: y(row.dataset.high) }, group);
      element("circle", { cx: px, cy: py, r: 11, fill: "transparent" }, group); // a finger is wider than a mark
      shape(series, px, py, !row.dataset.measured, group);
      element("circle", { class: "ring", cx: px, cy: py, r: 9 }, group);
      const show = () => showTip(label, px, py, width);
      const open = () => change({ card: row.dataset.id }, true);
      group.addEventListener("focus", show);
      group.addEventListener("mouseenter", show);
      for (const end of ["blur", "mouseleave"]) group.addEventListener(end, () => (tip.hidden = true));
      group.addEventListener("click", open);
      group.addEventListener("keydown", (event) => {
        const here = points.indexOf(group);
        const next = { ArrowRight: here + 1, ArrowUp: here + 1, ArrowLeft: here - 1, ArrowDown: here - 1, Home: 0, End: points.length - 1 }[event.key];
        if (event.key === "Escape") tip.hidden = true;
        else if (event.key === "Enter" || event.key === " ") open();
        else if (next !== undefined) focusOn(points, Math.min(points.length - 1, Math.max(0, next)));
        else return;
        event.preventDefault();
      });
      return group;
    });
    // One stop for the Tab key; the arrow keys go on from there.
    points[0].setAttribute("tabindex", 0);
    const again = points.findIndex((point) => point.dataset.point === focused);
    if (again >= 0) focusOn(points, again);
  }

  function focusOn(points, index) {
    for (const point of points) point.setAttribute("tabindex", point === points[index] ? 0 : -1);
    points[index].focus();
  }

  function showTip(text, x, y, width) {
    tip.textContent = text;
    tip.hidden = false;
    const left = scatter.offsetLeft + Math.min(Math.max(0, x - tip.offsetWidth / 2), width - tip.offsetWidth);
    const above = scatter.offsetTop + y - tip.offsetHeight - 14;
    const top = above < 0 ? scatter.offsetTop + y + 14 : above;
    tip.style.left = `${left}px`;
    tip.style.top = `${top}px`;
  }

  let lastWidth = 0;
  new ResizeObserver(() => {
    if (scatter.clientWidth !== lastWidth) draw();
    lastWidth = scatter.clientWidth;
  }).observe(scatter);
  apply();
}
