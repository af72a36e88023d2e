"use strict";
(() => {
  const tip = document.getElementById("tip");

  function light(mark, on) {
    const figure = mark.closest(".over-layers");
    if (!figure || !mark.dataset.segments) return;
    const spans = mark.dataset.segments.split(" ").map((span) => span.split("-").map(Number));
    for (const layer of figure.querySelectorAll(".layer")) {
      const number = Number(layer.dataset.layer);
      const inside = spans.some(([start, stop]) => start <= number && number < stop);
      layer.classList.toggle("hot", on && inside);
    }
  }

  function show(mark, x, y) {
    tip.textContent = mark.getAttribute("aria-label");
    tip.hidden = false;
    const room = document.documentElement.clientWidth;
    const box = tip.getBoundingClientRect();
    const left = Math.max(8, Math.min(x + 14, room - box.width - 8));
    const top = y - box.height - 14 > 8 ? y - box.height - 14 : y + 20;
    tip.style.transform = `translate(${left}px, ${top}px)`;
    light(mark, true);
  }

  function hide(mark) {
    tip.hidden = true;
    light(mark, false);
  }

  for (const mark of document.querySelectorAll(".mark")) {
    mark.addEventListener("pointerenter", (event) => show(mark, event.clientX, event.clientY));
    mark.addEventListener("pointerleave", () => hide(mark));
  }

  const switches = document.querySelector(".switches");
  if (switches) {
    switches.hidden = false;
    for (const box of switches.querySelectorAll("input")) {
      const apply = () => {
        for (const answer of document.querySelectorAll("[data-answer-of]")) {
          if (answer.dataset.answerOf === box.dataset.model) answer.hidden = !box.checked;
        }
      };
      box.addEventListener("change", apply);
      apply();
    }
  }
})();
