// ---- the stage: progress, the picture as it forms, and what is drawn

function busy(drawing) {
  const [hidden, shown] = drawing ? [at("draw"), at("stop")] : [at("stop"), at("draw")];
  const focused = document.activeElement === hidden;
  hidden.hidden = true;
  shown.hidden = false;
  if (focused) shown.focus();
  at("state").hidden = !drawing;
  at("bar").removeAttribute("value");
  at("text").textContent = "waiting for the server";
  at("said").textContent = drawing ? "drawing" : "";
}

function waiting(event) {
  if (event.before) at("text").textContent = `waiting: ${event.before} before yours`;
}

function progress(event, clock, name) {
  const { picture, pictures, step, steps } = event;
  at("bar").max = steps * pictures;
  at("bar").value = steps * (picture - 1) + step;
  const which = name || (pictures > 1 ? `picture ${picture} of ${pictures}, ` : "");
  const left = clock.secondsLeft(at("bar").value, at("bar").max);
  at("text").textContent = `${which}step ${step} of ${steps}${left === null ? "" : ` · ${duration(left)} left`}`;
  if (event.preview) forming(fromBase64(event.preview));
}

function duration(seconds) {
  if (seconds < 60) return `about ${Math.max(1, Math.round(seconds))} s`;
  return `about ${Math.round(seconds / 60)} min`;
}

function forming(blob) {
  showFile(at("forming"), blob);
  at("forming").hidden = !blob;
  at("empty").hidden = Boolean(blob) || at("pictures").childElementCount > 0 || !at("comparison").hidden;
}

// ---- pictures

function clear() {
  for (const image of document.querySelectorAll("#pictures img")) URL.revokeObjectURL(image.src);
  at("pictures").replaceChildren();
  at("comparison").hidden = true;
}

// drawn: {blob, parameters, times, cut, unknown}
async function show(drawn, first = true, several = false) {
  const image = made("img", { src: URL.createObjectURL(drawn.blob), alt: drawn.parameters.prompt });
  await image.decode();
  if (first) clear();
  at("pictures").classList.toggle("several", several);
  const figure = made("figure", {}, image, caption(drawn, image.src));
  at("pictures").append(figure);
  forming(null);
  if (first) figure.scrollIntoView({ block: "nearest" }); // on a phone it is below the form
}

function caption({ blob, parameters, times, cut, unknown }, file) {
  const facts = made("span", {}, `seed ${parameters.seed} · ${seconds(times).toFixed(1)} s`);
  const again = made("button", { type: "button", className: "small", textContent: "Start from it" });
  again.addEventListener("click", () => setInit(blob));
  return made("figcaption", {}, facts, again, download(parameters, file, "Download PNG"), ...told(cut, unknown));
}

// cut: texts that were too long; unknown: {word: [those that are near]}. Both are lines in plain words.
function told(cut = [], unknown = {}) {
  const lines = [
    ...cut.map((text) => `Too long, not read: “${text}”`),
    ...Object.entries(unknown).map(([word, near]) => `This model has not learned “${word}”${instead(near)}.`),
  ];
  return lines.map((text) => made("p", { className: "told" }, text));
}

function instead(near) {
  const words = near.map((word) => `“${word}”`);
  return words.length ? `. Near to it: ${words.join(", ")}` : "";
}

function seconds(times) {
  return Object.values(times).reduce((sum, time) => sum + time, 0);
}

function download({ prompt, seed }, file, text) {
  const link = { href: file, download: `${slug(prompt)}-${seed}.png`, title: "with its parameters in it" };
  return made("a", link, text);
}

function slug(prompt) {
  return prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu)?.join("-").slice(0, 40) || "picture";
}
