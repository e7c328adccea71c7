// The WebGPU device, as the module's imports ask for it.

// Whether a call of the module can be suspended while the device works (JavaScript Promise Integration).
export const canSuspend = 'Suspending' in WebAssembly && 'promising' in WebAssembly;

const LIMITS = [
  'maxBufferSize',
  'maxComputeInvocationsPerWorkgroup',
  'maxComputeWorkgroupSizeX',
  'maxComputeWorkgroupStorageSize',
  'maxStorageBufferBindingSize',
  'maxStorageBuffersPerShaderStage',
];

// Opens the device, or says in words why there is none.
export async function openDevice() {
  if (!navigator.gpu) {
    return { reason: 'this browser offers no WebGPU here' };
  }
  if (!canSuspend) {
    return { reason: 'this browser has WebGPU, but cannot suspend WebAssembly while a device works' };
  }
  let adapter;
  try {
    adapter = await navigator.gpu.requestAdapter({ powerPreference: 'high-performance' });
  } catch (error) {
    return { reason: `the browser refused a WebGPU adapter: ${error.message}` };
  }
  if (!adapter) {
    return { reason: 'the browser shows no WebGPU adapter' };
  }
  const { vendor, architecture, description, isFallbackAdapter } = adapter.info;
  const name = description || [vendor, architecture].filter(Boolean).join(' ') || 'unnamed adapter';
  const requiredLimits = Object.fromEntries(LIMITS.map((limit) => [limit, adapter.limits[limit]]));
  try {
    const device = await adapter.requestDevice({ requiredLimits });
    const software = Boolean(isFallbackAdapter);
    return { gpu: new Gpu(device, name, software), name, software };
  } catch (error) {
    return { reason: `the adapter ${name} gave no device: ${error.message}` };
  }
}

// What the imports are where there is no device.
export class NoGpu {
  imports() {
    const absent = () => {
      throw new Error('no device is open');
    };
    const names = ['message', 'buffer', 'free', 'write', 'pipeline', 'submit', 'finish'];
    return { describe: () => 0, ...Object.fromEntries(names.map((name) => [name, absent])) };
  }
}

class Gpu {
  #device;
  #name;
  #software;
  #memory;
  #buffers = new Map();
  #pipelines = new Map();
  #compiling = [];
  #layouts = new Map();
  #groups = new Map();
  #next = 1;
  #lost = null;
  #message = '';

  constructor(device, name, software) {
    this.#device = device;
    this.#name = name;
    this.#software = software;
    device.lost.then((info) => {
      this.#lost = info.message || info.reason;
    });
    this.#watch();
  }

  // Why the device is gone, or null.
  get lost() {
    return this.#lost;
  }

  // The functions that the module imports; `memory` gives its memory once there is one.
  imports(memory) {
    this.#memory = memory;
    return {
      describe: (to, room) => this.#put(this.#describe(), to, room),
      message: (to, room) => this.#put(this.#message, to, room),
      buffer: (words, purpose) => this.#buffer(words, purpose),
      free: (id) => this.#free(id),
      write: (id, at, from, words) => {
        this.#device.queue.writeBuffer(this.#buffers.get(id), at * 4, this.#memory().buffer, from, words * 4);
      },
      pipeline: (name, nameLength, text, textLength, weights, states) =>
        this.#pipeline(this.#text(name, nameLength), this.#text(text, textLength), weights, states),
      submit: (job, words) => this.#submit(new Uint32Array(this.#memory().buffer, job, words)),
      finish: new WebAssembly.Suspending((id, to, words) => this.#finish(id, to, words)),
    };
  }

  #describe() {
    const { maxStorageBufferBindingSize, minStorageBufferOffsetAlignment, maxStorageBuffersPerShaderStage } =
      this.#device.limits;
    return [
      `name ${this.#name}`,
      `binding_bytes ${Math.min(maxStorageBufferBindingSize, 2 ** 31)}`,
      `alignment ${minStorageBufferOffsetAlignment}`,
      `buffers ${maxStorageBuffersPerShaderStage}`,
      `software ${Number(this.#software)}`,
      `dots ${Number(navigator.gpu.wgslLanguageFeatures?.has('packed_4x8_integer_dot_product') ?? false)}`,
    ].join('\n');
  }

  #put(text, to, room) {
    const bytes = new TextEncoder().encode(text);
    if (bytes.length <= room) {
      new Uint8Array(this.#memory().buffer, to, bytes.length).set(bytes);
    }
    return bytes.length;
  }

  #text(at, length) {
    return new TextDecoder().decode(new Uint8Array(this.#memory().buffer, at, length));
  }

  #watch() {
    this.#device.pushErrorScope('validation');
    this.#device.pushErrorScope('out-of-memory');
  }

  #buffer(words, purpose) {
    const { STORAGE, COPY_DST, COPY_SRC, MAP_READ } = GPUBufferUsage;
    const usage = purpose === 1 ? MAP_READ | COPY_DST : STORAGE | COPY_DST | COPY_SRC;
    const id = this.#next++;
    this.#buffers.set(id, this.#device.createBuffer({ size: words * 4, usage }));
    return id;
  }

  #free(id) {
    this.#buffers.get(id)?.destroy();
    this.#pipelines.delete(id);
    if (this.#buffers.delete(id)) {
      this.#groups.clear();
    }
  }

  // Behind arguments and arena come weights, which are read, and states, which are written too.
  #layout(weights, states) {
    const key = `${weights},${states}`;
    if (!this.#layouts.has(key)) {
      const storage = (binding, type, hasDynamicOffset = false) => ({
        binding,
        visibility: GPUShaderStage.COMPUTE,
        buffer: { type, hasDynamicOffset },
      });
      const entries = [storage(0, 'read-only-storage', true), storage(1, 'storage')];
      for (let weight = 0; weight < weights; weight++) {
        entries.push(storage(2 + weight, 'read-only-storage'));
      }
      for (let state = 0; state < states; state++) {
        entries.push(storage(2 + weights + state, 'storage'));
      }
      const group = this.#device.createBindGroupLayout({ entries });
      const pipeline = this.#device.createPipelineLayout({ bindGroupLayouts: [group] });
      this.#layouts.set(key, { group, pipeline });
    }
    return this.#layouts.get(key);
  }

  #pipeline(name, code, weights, states) {
    const id = this.#next++;
    const { group, pipeline: layout } = this.#layout(weights, states);
    const begun = performance.now();
    const module = this.#device.createShaderModule({ label: name, code });
    const compiled = this.#device.createComputePipelineAsync({ label: name, layout, compute: { module } });
    const kept = compiled.then(
      (pipeline) => {
        this.#pipelines.set(id, { pipeline, layout: group, states });
        console.debug(`kernel ${name}: ${code.length} characters, ${Math.round(performance.now() - begun)} ms`);
      },
      async (error) => {
        const { messages } = await module.getCompilationInfo();
        const first = messages.find(({ type }) => type === 'error');
        const cause = first ? `line ${first.lineNum}: ${first.message}` : error.message;
        throw new Error(`kernel ${name}: ${cause}`);
      },
    );
    // It is awaited later; until then a failure is not one that nobody sees.
    kept.catch(() => {});
    this.#compiling.push(kept);
    return id;
  }

  #group({ layout, states }, bound, args, pitch, arena) {
    const key = [states, args, pitch, arena, ...bound].join();
    let group = this.#groups.get(key);
    if (!group) {
      const whole = (binding, id) => ({ binding, resource: { buffer: this.#buffers.get(id) } });
      const entries = [
        { binding: 0, resource: { buffer: this.#buffers.get(args), offset: 0, size: pitch } },
        whole(1, arena),
        ...Array.from(bound, (id, at) => whole(2 + at, id)),
      ];
      group = this.#device.createBindGroup({ layout, entries });
      this.#groups.set(key, group);
    }
    return group;
  }

  // A run: dispatches in order, then copies of words to the results.
  #submit(job) {
    const [arena, args, results, pitch, dispatches] = job;
    const encoder = this.#device.createCommandEncoder();
    const pass = encoder.beginComputePass();
    let at = 5;
    for (let index = 0; index < dispatches; index++) {
      const [id, offset, across, down, count] = job.subarray(at, at + 5);
      const bound = job.subarray(at + 5, at + 5 + count);
      const kernel = this.#pipelines.get(id);
      pass.setPipeline(kernel.pipeline);
      pass.setBindGroup(0, this.#group(kernel, bound, args, pitch, arena), [offset]);
      pass.dispatchWorkgroups(across, down);
      at += 5 + count;
    }
    pass.end();
    let to = 0;
    for (; at < job.length; at += 3) {
      const [from, first, count] = job.subarray(at, at + 3);
      encoder.copyBufferToBuffer(this.#buffers.get(from), first * 4, this.#buffers.get(results), to, count * 4);
      to += count * 4;
    }
    this.#device.queue.submit([encoder.finish()]);
  }

  // Waits for everything asked so far; the gravest failure is the message.
  async #finish(id, to, words) {
    const outcomes = await Promise.allSettled(this.#compiling.splice(0));
    const kernels = outcomes.filter(({ status }) => status === 'rejected').map(({ reason }) => reason.message);
    const scopes = [this.#device.popErrorScope(), this.#device.popErrorScope()];
    this.#watch();
    let unread = null;
    if (words > 0) {
      const begun = performance.now();
      const results = this.#buffers.get(id);
      try {
        await results.mapAsync(GPUMapMode.READ, 0, words * 4);
        console.debug(`a run: ${Math.round(performance.now() - begun)} ms`);
        const read = new Uint32Array(results.getMappedRange(0, words * 4));
        new Uint32Array(this.#memory().buffer, to, words).set(read);
        results.unmap();
      } catch (error) {
        unread = error.message;
      }
    }
    const [memory, invalid] = await Promise.all(scopes.map((scope) => scope.catch(() => null)));
    const failures = [
      this.#lost && `lost ${this.#lost}`,
      memory && `memory ${memory.message}`,
      kernels[0],
      invalid && `invalid ${invalid.message}`,
      unread && `lost ${unread}`,
    ].filter(Boolean);
    this.#message = failures[0] ?? '';
    return failures.length;
  }
}
