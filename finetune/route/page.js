"use strict";
// Shows one layer at a time, and one expert of it alone where that is asked for. Without it every layer is there.
const select = document.getElementById("layer");
const panels = Array.from(document.querySelectorAll("article.layer"));

function show(name) {
  for (const panel of panels) panel.hidden = panel.dataset.layer !== name;
  select.value = name;
}

function single(panel, button) {
  const isChosen = button.getAttribute("aria-pressed") === "true";
  for (const other of panel.querySelectorAll(".legend button")) other.setAttribute("aria-pressed", "false");
  button.setAttribute("aria-pressed", String(!isChosen));
  panel.classList.toggle("single", !isChosen);
  for (const one of panel.querySelectorAll("[data-expert]:not(button)")) {
    one.classList.toggle("chosen", one.dataset.expert === button.dataset.expert);
  }
}

for (const panel of panels) {
  for (const button of panel.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => single(panel, button));
  }
}
select.addEventListener("change", () => {
  show(select.value);
  history.replaceState(null, "", "#" + select.value);
});

// A layer may be named in the address, as index.html#text/layer_3.
const asked = () => panels.find((panel) => panel.dataset.layer === decodeURIComponent(location.hash.slice(1)));
window.addEventListener("hashchange", () => asked() && show(asked().dataset.layer));
if (panels.length) show(asked() ? asked().dataset.layer : select.value);
document.documentElement.dataset.ready = "true";
