// The page: what is asked for goes to the worker, what comes back is shown.

const STORY = 0;
const ENCODER = 1;
// A worker that does not stop in this time is ended.
const STOP_MS = 1500;

const at = (id) => document.getElementById(id);
const settings = new URLSearchParams(location.search);
let worker = null;
let calls = new Map();
let next = 1;

function start() {
  worker = new Worker(new URL('worker.js', import.meta.url), { type: 'module' });
  worker.onmessage = ({ data }) => {
    const call = calls.get(data.id);
    if (data.progress) {
      call?.progress(data.progress, data.done);
    } else if (data.piece !== undefined) {
      call?.piece(data.piece);
    } else {
      calls.delete(data.id);
      if (data.reset) {
        forget();
      }
      if (data.error) {
        call?.reject(Object.assign(new Error(data.error), { device: data.device }));
      } else {
        call?.resolve(data.value);
      }
    }
  };
  worker.onerror = (event) => end(event.message || 'the worker could not be started');
}

// Ends the worker: what it was asked for fails with the reason, models have to be loaded again.
function end(reason) {
  worker?.terminate();
  worker = null;
  const waiting = calls;
  calls = new Map();
  for (const call of waiting.values()) {
    call.reject(new Error(reason));
  }
  forget();
}

// The module is gone, and its models with it.
function forget() {
  for (const part of parts) {
    part.open = null;
    part.fault = null;
  }
}

function ask(request, handlers = {}) {
  if (!worker) {
    start();
  }
  const id = next++;
  return new Promise((resolve, reject) => {
    const none = () => {};
    calls.set(id, { progress: none, piece: none, ...handlers, resolve, reject });
    worker.postMessage({ id, ...request });
  });
}

function bytes(count) {
  return count < 1e6 ? `${(count / 1e3).toFixed(0)} kB` : `${(count / 1e6).toFixed(1)} MB`;
}

function milliseconds(ms) {
  return ms < 10 ? `${ms.toFixed(1)} ms` : `${ms.toFixed(0)} ms`;
}

// One half of the page: its model, its state and its messages.
class Part {
  // What is open: the choice and the model.
  open = null;
  // Why the device that was chosen by itself did not do for it.
  fault = null;

  constructor(id, slot) {
    this.root = at(id);
    this.slot = slot;
    this.status = this.root.querySelector('.status');
    this.device = this.root.querySelector('.device');
    this.bar = this.root.querySelector('progress');
    this.buttons = [...this.root.querySelectorAll('button')];
  }

  say(text, done) {
    this.status.textContent = text;
    this.bar.hidden = this.root.dataset.state !== 'busy';
    if (done === undefined) {
      this.bar.removeAttribute('value');
    } else {
      this.bar.value = done;
    }
  }

  // Runs a task with the buttons off; an error is shown in words.
  async busy(task) {
    this.root.dataset.state = 'busy';
    this.root.setAttribute('aria-busy', 'true');
    for (const button of this.buttons) {
      button.disabled = !button.classList.contains('stop');
    }
    let state = 'done';
    try {
      this.say(await this.withCpu(task));
    } catch (error) {
      state = 'failed';
      this.say(`This did not work: ${error.message}`);
    }
    this.root.dataset.state = state;
    this.root.removeAttribute('aria-busy');
    this.bar.hidden = true;
    for (const button of this.buttons) {
      button.disabled = button.classList.contains('stop');
    }
  }

  // A task that begins again on the CPU if a device fails that was not asked for.
  async withCpu(task) {
    try {
      return await task();
    } catch (error) {
      if (!error.device || at('device').value !== 'auto' || this.fault) {
        throw error;
      }
      this.open = null;
      this.fault = { of: this.tried, reason: error.message.replace(/\.$/, '') };
      return task();
    }
  }

  async load(model) {
    const key = JSON.stringify([at('device').value, model.name, model.address ?? '']);
    if (this.open === key && !model.files) {
      return;
    }
    this.open = null;
    this.tried = key;
    if (this.fault?.of !== key) {
      this.fault = null;
    }
    const choice = this.fault ? 'cpu' : at('device').value;
    const started = performance.now();
    const progress = (text, done) => this.say(text, done);
    const opened = await ask({ request: 'open', slot: this.slot, choice, ...model }, { progress });
    const why = this.fault ? `${this.fault.reason}; the CPU goes on` : opened.why;
    const parameters = (opened.parameters / 1e6).toFixed(opened.parameters < 1e7 ? 2 : 0);
    this.device.textContent =
      `${opened.name}, ${parameters} million parameters, opened in ` +
      `${milliseconds(performance.now() - started)}. Runs on: ${opened.device}. Why: ${why}. ` +
      `Memory of the module: ${bytes(opened.moduleBytes)}.`;
    this.open = key;
    this.task = opened.task;
  }
}

const story = new Part('story', STORY);
const encoder = new Part('encoder', ENCODER);
const parts = [story, encoder];

async function tell() {
  const text = at('text');
  const prompt = at('prompt').value;
  text.replaceChildren();
  const start = document.createElement('b');
  start.textContent = prompt;
  await story.load({ name: 'demo' });
  story.say('Generating');
  const generated = document.createElement('span');
  generated.id = 'generated';
  text.append(start, generated);
  const options = {
    prompt,
    max_tokens: Number(at('tokens').value),
    temperature: Number(at('temperature').value),
    seed: Number(at('seed').value),
  };
  const piece = (part) => generated.append(part);
  const report = await ask({ request: 'generate', slot: STORY, options }, { piece });
  const later = report.tokens - 1;
  const rate = later > 0 && report.decode_ms > 0 ? `${((later / report.decode_ms) * 1e3).toFixed(0)} tokens a second` : '';
  return (
    `${report.tokens} tokens after ${report.prompt_tokens} of the prompt: first after ` +
    `${milliseconds(report.prefill_ms)}${rate && `, then ${rate}`}; ${report.finish}.`
  );
}

function similarity(a, b) {
  const dot = (x, y) => x.reduce((sum, value, index) => sum + value * y[index], 0);
  return dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b));
}

async function compare() {
  const files = [...at('files').files].map((file) => {
    const path = file.webkitRelativePath.split('/').slice(1).join('/') || file.name;
    return { path, file };
  });
  const address = at('address').value;
  if (files.length === 0 && !address) {
    throw new Error('choose the folder of a sentence encoder, or give an address');
  }
  const model = files.length > 0 ? { name: 'chosen folder', files } : { name: address, address };
  if (files.length === 0 || !encoder.open || encoder.chosen !== at('files').value) {
    await encoder.load(model);
    encoder.chosen = files.length > 0 ? at('files').value : null;
  }
  if (encoder.task !== 'embed') {
    throw new Error('this model generates text; an encoder such as all-MiniLM-L6-v2 is needed');
  }
  encoder.say('Embedding');
  const embed = (id) => ask({ request: 'embed', slot: ENCODER, text: at(id).value });
  const [first, second] = [await embed('sentence'), await embed('other')];
  at('similarity').textContent = similarity(first.vector, second.vector).toFixed(4);
  at('vector').textContent = JSON.stringify(first.vector);
  at('numbers').hidden = false;
  return (
    `${first.vector.length} numbers a sentence; ${milliseconds(first.ms)} and ${milliseconds(second.ms)}.`
  );
}

function stop() {
  worker?.postMessage({ request: 'stop' });
  const waiting = [...calls.keys()];
  setTimeout(() => {
    if (waiting.some((id) => calls.has(id))) {
      end('stopped by ending the worker; the model is loaded again next time');
    }
  }, STOP_MS);
}

at('device').value = settings.get('device') ?? 'auto';
at('address').value = settings.get('encoder') ?? '';
at('tell').addEventListener('click', () => story.busy(tell));
at('stop').addEventListener('click', stop);
at('compare').addEventListener('click', () => encoder.busy(compare));
