// ---- the server: its limits, its answers, and its silence in words

const GONE = "The server does not answer. Is it still running?";

let limits = { max_body: 8 * 2 ** 20 }; // until it has told them

async function greet() {
  try {
    const server = await (await fetch("healthz")).json();
    limits = server.limits;
    at("model").textContent = `${server.model} on ${server.device}`;
  } catch {
    fail(GONE);
  }
}

// The answer to a request with values as JSON. Throws an Error that can be shown.
async function post(path, values, signal, accept = "application/json") {
  const body = JSON.stringify(values);
  if (body.length > limits.max_body) throw new Error(`this is over the ${megabytes(limits.max_body)} that the server takes`);
  const headers = { "Content-Type": "application/json", Accept: accept };
  const response = await fetch(path, { method: "POST", headers, body, signal }).catch((error) => {
    throw signal?.aborted ? error : new Error(GONE);
  });
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  throw new Error(answer.error || `the server answered ${response.status}`);
}

function megabytes(bytes) {
  return `${(bytes / 2 ** 20).toFixed(1)} MB`;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done: ended, value } = await reader.read();
    if (ended) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

// Draw what is asked for, and show each event as it comes. order: {values, init, mask}.
async function draw(order, signal, onPicture, name = "") {
  const values = { ...order.values };
  if (order.init) values.init_image = await toBase64(order.init);
  if (order.mask) values.mask = await toBase64(order.mask);
  const response = await post("generate", values, signal, "application/x-ndjson");
  const clock = new Clock();
  try {
    for await (const event of events(response)) {
      if (event.event === "waiting") waiting(event);
      else if (event.event === "step") progress(event, clock, name);
      else if (event.event === "picture") await onPicture(event);
      else if (event.event === "error") throw new Error(event.error);
      else if (event.event === "done") return;
    }
  } catch (error) {
    throw error instanceof TypeError && !signal.aborted ? new Error(GONE) : error;
  }
  throw new Error("the connection ended before the picture was done");
}

// How long the rest takes, at the pace of the steps so far.
class Clock {
  secondsLeft(done, all) {
    const now = performance.now();
    this.first ??= { done, now };
    const steps = done - this.first.done;
    return steps < 2 ? null : (now - this.first.now) / steps * (all - done) / 1000;
  }
}
