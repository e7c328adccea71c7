/* llama.cpp's whole process to the first token: loads a GGUF file, reads 8 tokens, takes the likeliest next one.
   ./llama_first FILE.gguf THREADS */
#include <llama.h>
#include <stdio.h>
#include <stdlib.h>

static void quiet(enum ggml_log_level level, const char *text, void *data) {
    (void)level, (void)text, (void)data;
}

int main(int argc, char **argv) {
    if (argc != 3) return fprintf(stderr, "llama_first FILE.gguf THREADS\n"), 2;
    llama_log_set(quiet, NULL);
    llama_backend_init();
    struct llama_model *model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return fprintf(stderr, "%s: cannot be loaded\n", argv[1]), 1;
    struct llama_context_params params = llama_context_default_params();
    params.n_ctx = 64;
    params.n_batch = params.n_ubatch = 64;
    params.n_threads = params.n_threads_batch = atoi(argv[2]);
    struct llama_context *context = llama_init_from_model(model, params);
    llama_token prompt[8];
    for (int i = 0; i < 8; i++) prompt[i] = i * 131;
    if (!context || llama_decode(context, llama_batch_get_one(prompt, 8))) return 1;
    const float *logits = llama_get_logits_ith(context, -1);
    int vocab = llama_vocab_n_tokens(llama_model_get_vocab(model)), best = 0;
    for (int i = 1; i < vocab; i++)
        if (logits[i] > logits[best]) best = i;
    printf("%d\n", best);
    return 0;
}
