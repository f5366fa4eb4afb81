// A client of pagewire built from the .proto files alone: node client.js TARGET PROTO_DIR
// Prints one JSON object with what it saw; the Python test checks it.
'use strict';

const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');

const [target, protoDir] = process.argv.slice(2);
const definition = protoLoader.loadSync('pagewire/inference/v1/inference.proto', {
  includeDirs: [protoDir],
  keepCase: true,
  longs: Number,
  enums: String,
  oneofs: true,
});
const { InferenceService } = grpc.loadPackageDefinition(definition).pagewire.inference.v1;
const client = new InferenceService(target, grpc.credentials.createInsecure());

function call(method, request) {
  return new Promise((resolve, reject) => {
    client[method](request, (error, response) => (error ? reject(error) : resolve(response)));
  });
}

// Reads a stream to its end, or cancels it after `cancelAfter` events.
function stream(request, cancelAfter = Infinity) {
  return new Promise((resolve) => {
    const events = [];
    const running = client.Generate(request);
    running.on('data', (event) => {
      events.push(event);
      if (events.length === cancelAfter) running.cancel();
    });
    running.on('error', (error) => resolve({ events, code: grpc.status[error.code], message: error.details }));
    running.on('end', () => resolve({ events, code: 'OK' }));
  });
}

async function main() {
  const messages = { messages: [{ role: 'user', content: 'Say hello.' }] };
  const sampling = { temperature: 0, max_tokens: 12 };
  const models = await call('ListModels', {});
  const tokens = await call('Tokenize', { text: 'Hello, wörld' });
  const text = await call('Detokenize', { token_ids: tokens.token_ids });
  const whole = await call('GenerateOnce', { messages, sampling });
  const streamed = await stream({ messages, sampling });
  const cancelled = await stream({ text: 'Once', sampling: { max_tokens: 500, ignore_eos: true } }, 3);
  const refused = await stream({ text: 'Hello', sampling: { temperature: -1 } });
  console.log(JSON.stringify({ models, text, whole, streamed, cancelled, refused }));
  client.close();
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
