// The page's device, failing as a message on the channel `faults` says. The browser's part of it is changed, so the page's is all at work.

export { NoGpu, canSuspend } from '../gpu.js';
import { openDevice as open } from '../gpu.js';

// A kind, with how many runs are spared or the kernel's name.
let fault = {};
let current = null;

new BroadcastChannel('faults').onmessage = ({ data }) => {
  fault = data;
};

// An adapter that computes in software passes for one that does not.
export async function openDevice() {
  return { ...(await open()), software: false };
}

const { requestDevice } = GPUAdapter.prototype;
GPUAdapter.prototype.requestDevice = async function (...args) {
  current = await requestDevice.apply(this, args);
  return current;
};

const { submit } = GPUQueue.prototype;
GPUQueue.prototype.submit = function (...args) {
  submit.apply(this, args);
  if (fault.kind === 'lost' && fault.spared-- === 0) {
    current.destroy();
  }
};

const { createShaderModule } = GPUDevice.prototype;
GPUDevice.prototype.createShaderModule = function (options) {
  const refused = fault.kind === 'kernel' && options.label.startsWith(fault.name);
  const code = refused ? `${options.code}const wrong: u32 = -1;\n` : options.code;
  return createShaderModule.call(this, { ...options, code });
};
