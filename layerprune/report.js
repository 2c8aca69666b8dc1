(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const share = (n) => `${n} of ${data.layers} layers dropped (${((100 * n) / data.layers).toFixed(1)} %)`;
  const clamp = (v, low, high) => Math.max(low, Math.min(high, v));

  // Each picture: steps it can be moved by, and what it says at a place.
  function curves(panel) {
    return {
      at: [0], most: [panel.x.length - 1],
      find: (x) => [panel.x.reduce((best, v, i) => (Math.abs(v - x) < Math.abs(panel.x[best] - x) ? i : best), 0)],
      mark: (cursor, [i]) => cursor.setAttribute("transform", `translate(${panel.x[i]} 0)`),
      spot: ([i], y) => [panel.x[i], y],
      head: ([i]) => panel.heads ? panel.heads[i] : share(panel.n[i]),
      rows: ([i]) => panel.v.flatMap((values, s) => {
        const found = values[i];
        if (!found) return [];
        if (panel.names) return [[panel.names[s], found[0].toFixed(4)]];
        if (panel.n[i] === 0 && s > 0) return [];
        const range = found[1] === null || found[2] === null ? "" : `${found[1].toFixed(3)} to ${found[2].toFixed(3)}`;
        const who = panel.n[i] === 0 ? "whole model" : `${data.names[s]} ${data.blocks[s][panel.n[i]] || ""}`;
        return [[who, found[0].toFixed(4), range]];
      }),
    };
  }
  function heat({ d, best, box: [left, top, cell, tall] }) {
    const within = ([l, n]) => [clamp(l, 0, d[clamp(n, 1, d.length) - 1].length - 1), clamp(n, 1, d.length)];
    const corner = ([l, n]) => [left + l * cell, top + (d.length - n) * tall];
    return {
      at: within([0, 1]), most: null, within,
      find: (x, y) => {
        const l = Math.floor((x - left) / cell), n = d.length - Math.floor((y - top) / tall);
        return d[n - 1] && Number.isFinite(d[n - 1][l]) ? [l, n] : null;
      },
      mark: (cursor, at) => cursor.setAttribute("transform", `translate(${corner(at)})`),
      spot: (at) => corner(at).map((v, i) => v + [cell, tall][i] / 2),
      head: ([l, n]) => `layers ${l}:${l + n}${best[n] === l ? ", the best start" : ""}`,
      rows: ([l, n]) => [["first layer l", String(l)], ["block size n", String(n)], ["distance d", d[n - 1][l]?.toFixed(4) ?? "–"]],
    };
  }

  function show(svg, picture, y) {
    const [x, v] = picture.spot(picture.at, y);
    const matrix = svg.getScreenCTM(), place = new DOMPoint(x, v).matrixTransform(matrix);
    const cursor = svg.querySelector(".cursor"), rows = picture.rows(picture.at), head = picture.head(picture.at);
    cursor.removeAttribute("display");
    picture.mark(cursor, picture.at);
    const table = document.createElement("table");
    for (const row of rows) {
      const line = table.insertRow();
      for (const text of row) line.insertCell().textContent = text;
    }
    const title = document.createElement("strong");
    title.textContent = head;
    tip.replaceChildren(title, table);
    tip.hidden = false;
    const wide = tip.offsetWidth, high = tip.offsetHeight, room = document.documentElement.clientWidth;
    const side = place.x + 14 + wide < room ? place.x + 14 : place.x - 14 - wide;
    tip.style.transform = `translate(${clamp(side, 8, Math.max(8, room - wide - 8))}px, ${clamp(place.y - high - 10, 8, innerHeight)}px)`;
    svg.setAttribute("aria-valuetext", [head, ...rows.map((row) => row.join(" "))].join("; "));
    svg.setAttribute("aria-valuenow", picture.at[0]);
  }
  function hide(svg) {
    svg.querySelector(".cursor").setAttribute("display", "none");
    tip.hidden = true;
  }

  for (const svg of document.querySelectorAll("svg.plot")) {
    const picture = "heat" in svg.dataset ? heat(data.heat) : curves(data.panels[svg.dataset.panel]);
    const middle = svg.viewBox.baseVal.height / 2;
    const point = (event) => {
      const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      const found = picture.find(place.x, place.y);
      if (!found) return hide(svg);
      picture.at = found;
      show(svg, picture, place.y);
    };
    svg.setAttribute("role", "slider");
    svg.setAttribute("tabindex", "0");
    svg.setAttribute("aria-valuemin", "0");
    svg.setAttribute("aria-valuemax", picture.most ? picture.most[0] : data.layers - 1);
    svg.setAttribute("aria-valuenow", picture.at[0]);
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", () => hide(svg));
    svg.addEventListener("focus", () => svg.matches(":focus-visible") && show(svg, picture, middle));
    svg.addEventListener("blur", () => hide(svg));
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1], Home: [-999, 0], End: [999, 0] }[event.key];
      if (event.key === "Escape") return hide(svg);
      if (!step) return;
      event.preventDefault();
      const to = picture.at.map((v, i) => v + step[i]);
      picture.at = picture.within ? picture.within(to) : [clamp(to[0] + step[1], 0, picture.most[0])];
      show(svg, picture, middle);
    });
  }
})();
