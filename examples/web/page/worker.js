// Runs the module, so that the page stays responsive. One call after another; "stop" ends the text being generated.

import { NoGpu, canSuspend, openDevice } from './gpu.js';

const MODULE = 'rlx_web.wasm';
// What a folder may hold, besides what it must.
const NEEDED = ['config.json', 'tokenizer.json', 'model.safetensors'];
const OPTIONAL = [
  'generation_config.json',
  'tokenizer_config.json',
  'modules.json',
  'sentence_bert_config.json',
  'config_sentence_transformers.json',
  '1_Pooling/config.json',
];
// How long text is generated before the page's messages are looked at.
const PATIENCE_MS = 30;

let module = null;
let device = {};
let answer = null;
let panic = null;
let current = null;
let stopped = false;

function memory() {
  return module.memory;
}

function view(at, length) {
  return new Uint8Array(memory().buffer, at, length);
}

function decode(at, length) {
  return new TextDecoder().decode(view(at, length));
}

function post(message) {
  self.postMessage({ id: current, ...message });
}

// Lets waiting messages in; a timer would wait longer each time.
function turn() {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}

let looked = 0;

async function pieceAndLook(at, length) {
  post({ piece: decode(at, length) });
  if (performance.now() - looked > PATIENCE_MS) {
    await turn();
    looked = performance.now();
  }
  return stopped ? 0 : 1;
}

function pageImports() {
  return {
    now_ms: () => performance.now(),
    random(at, length) {
      for (let from = 0; from < length; from += 65536) {
        crypto.getRandomValues(view(at + from, Math.min(65536, length - from)));
      }
    },
    answer(at, length) {
      answer = JSON.parse(decode(at, length));
    },
    piece: canSuspend
      ? new WebAssembly.Suspending(pieceAndLook)
      : (at, length) => {
          post({ piece: decode(at, length) });
          return 1;
        },
    panicked(at, length) {
      panic = decode(at, length);
    },
  };
}

// Loads the module once, with the device that the browser gives.
async function load() {
  if (module) {
    return;
  }
  post({ progress: 'Asking for a WebGPU adapter' });
  device = await openDevice();
  post({ progress: 'Loading the module' });
  const imports = { page: pageImports(), gpu: (device.gpu ?? new NoGpu()).imports(memory) };
  const response = await fetch(new URL(MODULE, import.meta.url));
  if (!response.ok) {
    throw new Error(`the module ${MODULE} is not beside the page: the site answered ${response.status}`);
  }
  let loaded;
  try {
    loaded = await WebAssembly.instantiateStreaming(response, imports);
  } catch (error) {
    throw new Error(`this browser does not load the module, which needs 128-bit vectors: ${error.message}`);
  }
  module = loaded.instance.exports;
  module.start();
}

function writeText(text) {
  const bytes = new TextEncoder().encode(text);
  const at = module.text(bytes.length);
  view(at, bytes.length).set(bytes);
}

// Calls a function that may wait for the device.
async function call(name, ...args) {
  const exported = module[name];
  try {
    const ran = canSuspend ? await WebAssembly.promising(exported)(...args) : exported(...args);
    if (ran) {
      return answer;
    }
  } catch (error) {
    const cause = panic ?? error.message;
    module = null;
    panic = null;
    throw new Error(`the module stopped: ${cause}. It is loaded anew at the next try.`);
  }
  const failure = Object.assign(new Error(answer.error), { device: answer.device });
  if (device.gpu?.lost) {
    // What was on it is gone; the next try asks for an adapter anew.
    module = null;
  }
  throw failure;
}

function room(name, length) {
  const at = module.bytes(length);
  if (at === 0) {
    throw new Error(`${name}: ${length} bytes do not fit into the module's memory, which ends at 4 GiB`);
  }
  return at;
}

function added(name) {
  writeText(name);
  module.add_file();
}

// Fetches a file into the module's memory; false if the site has none of that name.
async function fetchFile(folder, name, needed) {
  const response = await fetch(new URL(name, folder));
  if (!response.ok) {
    if (needed) {
      throw new Error(`${name}: the site answered ${response.status} for ${response.url}`);
    }
    return;
  }
  const length = Number(response.headers.get('content-length'));
  if (response.headers.get('content-encoding') || !length) {
    const bytes = new Uint8Array(await response.arrayBuffer());
    view(room(name, bytes.length), bytes.length).set(bytes);
    added(name);
    return;
  }
  const at = room(name, length);
  const reader = response.body.getReader();
  let received = 0;
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    if (received + part.value.length > length) {
      throw new Error(`${name}: more than the ${length} bytes that the site announced`);
    }
    view(at + received, part.value.length).set(part.value);
    received += part.value.length;
    post({ progress: `Fetching ${name}`, done: received / length });
  }
  if (received < length) {
    throw new Error(`${name}: ${received} of ${length} bytes arrived`);
  }
  added(name);
}

const requests = {
  async open({ slot, name, address, files, choice }) {
    await load();
    const picked = pick(choice);
    if (address) {
      const folder = new URL(address.endsWith('/') ? address : `${address}/`, self.location.href);
      for (const file of NEEDED) {
        await fetchFile(folder, file, true);
      }
      for (const file of OPTIONAL) {
        await fetchFile(folder, file, false);
      }
    }
    for (const { path, file } of files ?? []) {
      post({ progress: `Reading ${path}` });
      const bytes = new Uint8Array(await file.arrayBuffer());
      view(room(path, bytes.length), bytes.length).set(bytes);
      added(path);
    }
    post({ progress: 'Opening the model' });
    writeText(name);
    const opened = await call('open', slot, picked.device ? 1 : 0, picked.scalar ? 1 : 0);
    return { ...opened, why: picked.why, moduleBytes: memory().buffer.byteLength };
  },
  async embed({ slot, text }) {
    const started = performance.now();
    writeText(text);
    const vector = await call('embed', slot);
    return { vector, ms: performance.now() - started };
  },
  async generate({ slot, options }) {
    stopped = false;
    looked = performance.now();
    writeText(JSON.stringify(options));
    return call('generate', slot);
  },
  async close({ slot }) {
    module?.close(slot);
  },
};

// What to run on, and why.
function pick(choice) {
  if (choice === 'gpu') {
    if (!device.gpu) {
      throw new Error(`WebGPU was asked for, but ${device.reason}`);
    }
    return { device: true, why: 'WebGPU was asked for' };
  }
  if (choice === 'scalar') {
    return { scalar: true, why: 'plain code on the CPU was asked for' };
  }
  if (choice === 'cpu') {
    return { why: 'the CPU was asked for' };
  }
  if (!device.gpu) {
    return { why: device.reason };
  }
  if (device.software) {
    return { why: `the only WebGPU adapter, ${device.name}, computes on the CPU itself` };
  }
  return { device: true, why: `the browser has the WebGPU adapter ${device.name}` };
}

let queue = Promise.resolve();

self.onmessage = ({ data }) => {
  if (data.request === 'stop') {
    stopped = true;
    return;
  }
  queue = queue.then(async () => {
    current = data.id;
    try {
      post({ value: await requests[data.request](data) });
    } catch (error) {
      post({ error: error.message, device: Boolean(error.device), reset: module === null });
    }
  });
};
