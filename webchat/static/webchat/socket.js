/**
 * The WebSocket: frames to the page, and following answers across broken connections.
 *
 * Each followed answer has the sequence number of the last frame seen. After a reconnect the server is
 * asked for everything later than that, so that the page sees each frame once.
 */

const FRAME_BYTES = 250_000;
const FIRST_WAIT = 500;
const LONGEST_WAIT = 15_000;

export class Connection {
  /**
   * @param {string} path
   * @param {(frame: object) => void} onFrame
   * @param {(open: boolean) => void} onState
   */
  constructor(path, onFrame, onState) {
    this.url = new URL(path, location.href.replace(/^http/, "ws")).href;
    this.onFrame = onFrame;
    this.onState = onState;
    this.following = new Map();
    this.wait = FIRST_WAIT;
    this.socket = null;
    this.timer = null;
    addEventListener("online", () => this.retry());
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.retry();
    });
    this.connect();
  }

  get open() {
    return this.socket?.readyState === WebSocket.OPEN;
  }

  connect() {
    clearTimeout(this.timer);
    this.timer = null;
    const socket = new WebSocket(this.url);
    this.socket = socket;
    socket.addEventListener("open", () => {
      this.wait = FIRST_WAIT;
      for (const [message, after] of this.following) this.write({ type: "attach", message, after });
      this.onState(true);
    });
    socket.addEventListener("message", (event) => this.receive(event.data));
    socket.addEventListener("close", () => {
      if (socket !== this.socket) return;
      this.onState(false);
      // Not all at the same moment after a restart of the server.
      this.timer = setTimeout(() => this.connect(), this.wait * (0.75 + Math.random() / 2));
      this.wait = Math.min(this.wait * 2, LONGEST_WAIT);
    });
  }

  /** Connect now instead of after the wait. */
  retry() {
    if (this.timer !== null) {
      this.wait = FIRST_WAIT;
      this.connect();
    }
  }

  receive(data) {
    let frame;
    try {
      frame = JSON.parse(data);
    } catch {
      return;
    }
    if (frame.type === "delta" || frame.type === "end") {
      const last = this.following.get(frame.message);
      if (last === undefined) return;
      if (frame.type === "end") {
        this.following.delete(frame.message);
      } else {
        if (!later(frame.seq, last)) return;
        this.following.set(frame.message, frame.seq);
      }
    }
    this.onFrame(frame);
  }

  /** The server follows this answer for us already: keep its frames, and ask again after a reconnect. */
  expect(message) {
    this.following.set(message, "0");
  }

  attach(message, after = "0") {
    this.following.set(message, after);
    this.write({ type: "attach", message, after });
  }

  detach(message) {
    if (this.following.delete(message)) this.write({ type: "detach", message });
  }

  /** True when it was handed to an open connection. */
  write(frame) {
    if (!this.open) return false;
    this.socket.send(JSON.stringify(frame));
    return true;
  }
}

/** Would this frame be larger than the server takes? */
export function tooLarge(frame) {
  return new TextEncoder().encode(JSON.stringify(frame)).length > FRAME_BYTES;
}

/** Sequence numbers are two numbers with a dash between: compared as numbers, not as text. */
function later(sequence, last) {
  const [major, minor] = parts(sequence);
  const [lastMajor, lastMinor] = parts(last);
  return major > lastMajor || (major === lastMajor && minor > lastMinor);
}

function parts(sequence) {
  const [major, minor = "0"] = String(sequence).split("-");
  return [Number(major), Number(minor)];
}
