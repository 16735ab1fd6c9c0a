"use strict";

// ---- short names for what all parts do with the page

const at = (id) => document.getElementById(id);
const form = at("form");

function made(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function press(button, pressed) {
  button.setAttribute("aria-pressed", String(pressed));
}

function isPressed(button) {
  return button.getAttribute("aria-pressed") === "true";
}

// ---- what is told

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

function fail(message) {
  at("error").textContent = sentence(message);
  at("error").hidden = false;
}

function note(lines) {
  at("notes").textContent = lines.map(sentence).join("\n");
  at("notes").hidden = lines.length === 0;
}

function quiet() {
  at("error").hidden = true;
  note([]);
}

// ---- bytes

function fromBase64(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Blob([bytes], { type: "image/png" });
}

function toBase64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.replace(/^[^,]*,/, ""));
    reader.onerror = () => reject(new Error("the file cannot be read"));
    reader.readAsDataURL(blob);
  });
}

function toPng(canvas) {
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

// An image shows another file from now on; null: none.
function showFile(image, blob) {
  if (image.src) URL.revokeObjectURL(image.src);
  if (blob) image.src = URL.createObjectURL(blob);
  else image.removeAttribute("src");
}
