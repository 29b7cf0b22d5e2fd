// Browsers start no worker for a page that is opened from disk. There, the worker's script runs in a hidden frame, so
// that search works without a server and without a network.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.srcdoc =
        `<script>self.postMessage = (data) => frameElement.answer({ data })</script><script src="${url}"></script>`;
      this.frame.answer = (event) => this.onmessage?.(event);
      this.loaded = new Promise((resolve) => this.frame.addEventListener("load", resolve));
      document.body.append(this.frame);
    }

    postMessage(data) {
      // A worker gets a copy, and may change it.
      this.loaded.then(() => this.frame.contentWindow.onmessage({ data: structuredClone(data) }));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
